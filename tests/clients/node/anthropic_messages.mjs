// Anthropic's Node client: anthropic_messages.mjs URL MODEL
import Anthropic from "@anthropic-ai/sdk";

const [url, model] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: "any", maxRetries: 0 });
const tools = [{ name: "get_weather", input_schema: { type: "object", properties: { city: { type: "string" } } } }];
const asking = (words) => ({ model, max_tokens: 200, messages: [{ role: "user", content: words }] });
const told = (message) => [message.content.map((block) => block.text).join(""), message.usage.cache_read_input_tokens];

const whole = await client.messages.create(asking("plain"));
const streamed = await client.messages.stream(asking("plain")).finalMessage();
const called = await client.messages.stream({ ...asking("both cities"), tools }).finalMessage();
const thought = await client.messages.stream(asking("thoughts")).finalMessage();
const counted = await client.messages.countTokens({ model, messages: asking("plain").messages });
const refused = await client.messages.create({ ...asking("plain"), max_tokens: -1 }).catch((error) => error);
const models = [];
for await (const one of client.models.list()) models.push(one.id);

console.log(
  JSON.stringify({
    whole: told(whole),
    streamed: told(streamed),
    calls: called.content.filter((block) => block.type === "tool_use").map((block) => [block.name, block.input]),
    stop: called.stop_reason,
    thoughts: thought.content.map((block) => block.thinking ?? block.text),
    counted: counted.input_tokens === whole.usage.input_tokens + whole.usage.cache_read_input_tokens,
    refused: [refused.status, refused.error.error.type, refused.requestID === refused.error.request_id],
    models,
  }),
);
