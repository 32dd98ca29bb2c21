// The AI SDK's provider for OpenAI-compatible servers: reasoning and text parts, unary replies, errors.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, streamText } from 'ai';
import { root, serve } from './server.mjs';

const KEY = 'key-of-the-tests';
const [question] = JSON.parse(readFileSync(`${root}models/nano/demo/questions.json`));
let server;

before(async () => {
  server = await serve('--api-key', KEY);
});
after(async () => {
  assert.equal(await server.stop(), 0);
});

const nano = (apiKey = KEY, name = 'nano') =>
  createOpenAICompatible({ name: 'tinyllava', baseURL: `${server.url}/v1`, apiKey, includeUsage: true })(name);

/** The SDK has no video part: the content that the server knows is passed on with the text. */
function messages() {
  const clip = readFileSync(`${root}models/nano/demo/${question.video}`).toString('base64');
  const text = question.question;
  const video = { type: 'video_url', video_url: { url: `data:video/mp4;base64,${clip}` } };
  const content = [video, { type: 'text', text }];
  return [{ role: 'user', content: [{ type: 'text', text, providerOptions: { openaiCompatible: { content } } }] }];
}

test('streamText shows reasoning parts, then text parts', async () => {
  const kinds = [];
  const said = { 'reasoning-delta': '', 'text-delta': '' };
  const { fullStream, usage } = streamText({ model: nano(), messages: messages(), temperature: 0 });
  for await (const part of fullStream) {
    assert.notEqual(part.type, 'error', String(part.error));
    if (part.type in said) {
      said[part.type] += part.text;
      if (kinds.at(-1) !== part.type) kinds.push(part.type);
    }
  }
  assert.deepEqual(kinds, ['reasoning-delta', 'text-delta']);
  assert.equal(said['text-delta'].trim(), question.answer);
  const unary = await generateText({ model: nano(), messages: messages(), temperature: 0 });
  assert.equal(unary.text, said['text-delta']);
  assert.equal(unary.reasoningText, said['reasoning-delta']);
  assert.ok((await usage).outputTokens > 0);
});

test('errors come with their status and sentence', async () => {
  const refused = async (model, more, status) => {
    const asked = generateText({ model, messages: messages(), maxRetries: 0, ...more });
    await assert.rejects(asked, (error) => APICallError.isInstance(error) && error.statusCode === status);
  };
  await refused(nano('another'), {}, 401);
  await refused(nano(KEY, 'other'), {}, 404);
  await refused(nano(), { topP: 7 }, 400);
});
