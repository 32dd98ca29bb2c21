// A server on the embedded model, for the tests in JavaScript.
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

export const root = fileURLToPath(new URL('../../', import.meta.url));

/** Starts it; `url` has no path, and `stop` resolves to its exit code. */
export async function serve(...flags) {
  const server = spawn(`${root}target/debug/tinyllava`, ['serve', '--port', '0', ...flags], {
    cwd: root,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  const ended = new Promise((resolve) => server.on('close', resolve));
  const url = await new Promise((resolve, reject) => {
    const log = [];
    createInterface({ input: server.stderr }).on('line', (line) => {
      log.push(line);
      const ready = /ready: (\S+)/.exec(line);
      if (ready) resolve(ready[1]);
    });
    ended.then(() => reject(new Error(`the server ended:\n${log.join('\n')}`)));
  });
  const stop = () => {
    server.kill('SIGTERM');
    return ended;
  };
  return { url, stop };
}
