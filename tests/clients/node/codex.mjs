// Codex, asked once and not again: codex.mjs URL MODEL PROMPT [COMPACTED]. Its settings are in a home of its own, so that it asks nobody else.
// COMPACTED is how many tokens of context it lets stand.
import { spawn } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [url, model, prompt, compacted = 1_000_000] = process.argv.slice(2);
const home = join(process.env.HOME, "codex");
const work = join(process.env.HOME, "work");
mkdirSync(home, { recursive: true });
mkdirSync(work, { recursive: true });
writeFileSync(
  join(home, "config.toml"),
  `model = "${model}"
model_provider = "weft"
model_context_window = 60000
model_auto_compact_token_limit = ${compacted}
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.weft]
name = "Weft"
base_url = "${url}/v1"
wire_api = "responses"
env_key = "WEFT_KEY"
request_max_retries = 0
stream_max_retries = 0
`,
);

const codex = spawn(
  join(import.meta.dirname, "node_modules", ".bin", "codex"),
  ["exec", "--json", "--skip-git-repo-check", "--sandbox", "danger-full-access", prompt],
  { cwd: work, env: { ...process.env, CODEX_HOME: home, WEFT_KEY: "any" }, stdio: ["ignore", "pipe", "inherit"] },
);
let out = "";
codex.stdout.on("data", (data) => (out += data));
const code = await new Promise((ended) => codex.on("close", ended));
const told = out.split("\n").filter(Boolean).map((line) => JSON.parse(line));
const items = told.filter((event) => event.type === "item.completed").map((event) => event.item);
const of = (type) => items.filter((item) => item.type === type);

console.log(
  JSON.stringify({
    code,
    thoughts: of("reasoning").map((item) => item.text),
    commands: of("command_execution").map((item) => [item.aggregated_output, item.exit_code]),
    messages: of("agent_message").map((item) => item.text),
    failures: told.filter((event) => event.type.endsWith("failed") || event.type === "error"),
    usage: told.find((event) => event.type === "turn.completed")?.usage.cached_input_tokens,
  }),
);
