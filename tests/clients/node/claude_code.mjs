// Claude Code, as a shell without a terminal runs it: claude_code.mjs URL MODEL PROMPT
import { spawnSync } from "node:child_process";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const [url, model, prompt] = process.argv.slice(2);
const wrapper = join(dirname(createRequire(import.meta.url).resolve("@anthropic-ai/claude-code/package.json")), "cli-wrapper.cjs");
const run = spawnSync(
  process.execPath,
  [wrapper, "-p", prompt, "--model", model, "--allowedTools", "Bash", "--output-format", "stream-json", "--verbose"],
  {
    cwd: process.env.HOME,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "pipe"],
    timeout: 50_000,
    env: {
      ...process.env,
      ANTHROPIC_BASE_URL: url,
      ANTHROPIC_API_KEY: "sk-any",
      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
      DISABLE_AUTOUPDATER: "1",
      IS_SANDBOX: "1",
    },
  },
);
if (run.status !== 0) throw new Error(`claude ended with ${run.status}\n${run.stdout}\n${run.stderr}`);
const events = run.stdout.trim().split("\n").map((line) => JSON.parse(line));
const blocks = events.flatMap((event) => event.message?.content ?? []);
const done = events.findLast((event) => event.type === "result");

console.log(
  JSON.stringify({
    calls: blocks.filter((block) => block.type === "tool_use").map((block) => [block.name, block.input.command]),
    results: blocks.filter((block) => block.type === "tool_result").map((block) => block.content),
    result: done.result,
    usage: done.usage,
    errors: done.is_error,
  }),
);
