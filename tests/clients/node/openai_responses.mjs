// OpenAI's Node client over the Responses API: openai_responses.mjs URL MODEL
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const tools = [
  { type: "function", name: "get_weather", strict: false, parameters: { type: "object", properties: { city: { type: "string" } } } },
];

const whole = await client.responses.create({ model, input: "plain" });
const streamed = await client.responses.stream({ model, input: "plain" }).finalResponse();
const called = await client.responses.stream({ model, input: "both cities", tools }).finalResponse();
const thinking = await client.responses.stream({ model, input: "thoughts", reasoning: { summary: "auto" } }).finalResponse();
const more = await client.responses.create({ model, input: "plain", previous_response_id: whole.id });
const items = [];
for await (const item of client.responses.inputItems.list(more.id, { order: "asc", limit: 2 })) items.push(item.content[0].text);
await client.responses.delete(whole.id);
const gone = await client.responses.retrieve(whole.id).catch((error) => error);
const refused = await client.responses.create({ model, input: "plain", temperature: -1 }).catch((error) => error);

console.log(
  JSON.stringify({
    whole: [whole.output_text, whole.usage.input_tokens_details.cached_tokens],
    streamed: [streamed.output_text, streamed.usage.input_tokens_details.cached_tokens],
    calls: called.output.map((call) => [call.name, JSON.parse(call.arguments)]),
    thoughts: [thinking.output[0].summary[0].text, thinking.output_text],
    items,
    gone: gone.status,
    refused: [refused.status, refused.param],
  }),
);
