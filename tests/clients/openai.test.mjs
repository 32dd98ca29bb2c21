// OpenAI's client for JavaScript: chat in both modes, an upload for the Responses API, a forced
// function, errors.
import assert from 'node:assert/strict';
import { createReadStream, readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import OpenAI from 'openai';
import { root, serve } from './server.mjs';

const KEY = 'key-of-the-tests';
const [question] = JSON.parse(readFileSync(`${root}models/nano/demo/questions.json`));
const clip = `${root}models/nano/demo/${question.video}`;
let server;

before(async () => {
  server = await serve('--api-key', KEY);
});
after(async () => {
  assert.equal(await server.stop(), 0);
});

const client = (apiKey = KEY) => new OpenAI({ baseURL: `${server.url}/v1`, apiKey, maxRetries: 0 });

function asked(more = {}) {
  const url = `data:video/mp4;base64,${readFileSync(clip).toString('base64')}`;
  const content = [{ type: 'video_url', video_url: { url } }, { type: 'text', text: question.question }];
  return { model: 'nano', temperature: 0, messages: [{ role: 'user', content }], ...more };
}

test('a stream says the same as a unary reply', async () => {
  const { choices, usage } = await client().chat.completions.create(asked());
  assert.equal(choices[0].message.content.trim(), question.answer);
  const stream = await client().chat.completions.create(
    asked({ stream: true, stream_options: { include_usage: true, include_obfuscation: false } }),
  );
  const said = { reasoning_content: '', content: '' };
  let last;
  for await (const chunk of stream) {
    for (const field of Object.keys(said)) said[field] += chunk.choices[0]?.delta[field] ?? '';
    last = chunk;
  }
  assert.equal(said.content, choices[0].message.content);
  assert.equal(said.reasoning_content, choices[0].message.reasoning_content);
  assert.equal(last.usage.completion_tokens, usage.completion_tokens);
});

test('the stream helper puts the reply together', async () => {
  const stream = client().chat.completions.stream(asked());
  assert.equal((await stream.finalContent()).trim(), question.answer);
});

test('the Responses API is asked about an upload', async () => {
  const file = await client().files.create({ file: createReadStream(clip), purpose: 'user_data' });
  const content = [{ type: 'input_file', file_id: file.id }, { type: 'input_text', text: question.question }];
  const response = await client().responses.create({
    model: 'nano', temperature: 0, input: [{ role: 'user', content }],
  });
  assert.equal(response.output_text.trim(), question.answer);
  assert.ok((await client().files.delete(file.id)).deleted);
});

test('a forced function is called with arguments of its schema', async () => {
  const parameters = {
    type: 'object', properties: { letter: { enum: ['A', 'B'] } }, required: ['letter'], additionalProperties: false,
  };
  const { choices } = await client().chat.completions.create(
    asked({
      tools: [{ type: 'function', function: { name: 'answer', parameters } }],
      tool_choice: { type: 'function', function: { name: 'answer' } },
      max_tokens: 160,
    }),
  );
  const [call] = choices[0].message.tool_calls;
  assert.equal(call.function.name, 'answer');
  assert.match(JSON.parse(call.function.arguments).letter, /^[AB]$/);
});

test('errors come with their classes, status and field', async () => {
  const create = (key, more) => client(key).chat.completions.create(asked(more));
  await assert.rejects(create('another'), OpenAI.AuthenticationError);
  await assert.rejects(create(KEY, { model: 'other' }), OpenAI.NotFoundError);
  await assert.rejects(create(KEY, { top_p: 7 }), (error) => {
    return error instanceof OpenAI.BadRequestError && error.param === 'top_p';
  });
});
