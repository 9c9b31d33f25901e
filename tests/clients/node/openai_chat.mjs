// OpenAI's Node client: openai_chat.mjs URL MODEL
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const tools = [
  { type: "function", function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } } },
];
const asking = (words) => ({ model, messages: [{ role: "user", content: words }] });

const whole = await client.chat.completions.create(asking("plain"));
const runner = client.chat.completions.stream({ ...asking("plain"), stream_options: { include_usage: true } });
const streamed = await runner.finalChatCompletion();
const called = await client.chat.completions.stream({ ...asking("both cities"), tools }).finalChatCompletion();
const refused = await client.chat.completions.create({ ...asking("plain"), temperature: -1 }).catch((error) => error);
const models = [];
for await (const one of client.models.list()) models.push(one.id);

console.log(
  JSON.stringify({
    whole: [whole.choices[0].message.content, whole.usage.prompt_tokens_details.cached_tokens],
    streamed: [streamed.choices[0].message.content, streamed.usage.prompt_tokens_details.cached_tokens],
    calls: called.choices[0].message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]),
    refused: [refused.status, refused.param],
    models,
  }),
);
