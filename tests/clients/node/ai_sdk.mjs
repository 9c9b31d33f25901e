// Vercel's AI SDK, whose OpenAI models speak the Responses API: ai_sdk.mjs URL MODEL
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: "any" })(name);
const tools = {
  get_weather: tool({
    description: "Tell the weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `${city}: 21 degrees`,
  }),
};
const asking = (prompt) => ({ model, prompt, maxRetries: 0 });

const whole = await generateText(asking("plain"));
const streamed = streamText(asking("plain"));
let deltas = "";
for await (const delta of streamed.textStream) deltas += delta;
const agent = await generateText({ ...asking("both cities"), tools, stopWhen: stepCountIs(4) });
const thinking = await generateText({ ...asking("thoughts"), providerOptions: { openai: { forceReasoning: true, reasoningSummary: "auto" } } });
const form = await generateObject({ ...asking("a form"), schema: z.object({ name: z.string(), people: z.number() }) });
const refused = await generateText({ ...asking("plain"), topP: 2 }).catch((error) => error);

console.log(
  JSON.stringify({
    whole: [whole.text, whole.usage.cachedInputTokens],
    streamed: [deltas, (await streamed.usage).cachedInputTokens],
    agent: [agent.text, agent.steps[0].toolCalls.map((call) => [call.toolName, call.input])],
    thoughts: [thinking.reasoningText, thinking.text],
    form: form.object,
    refused: refused.statusCode,
  }),
);
