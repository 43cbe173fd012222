// An HTTP server that answers with what it got, and clients that keep their connections: server|client ADDRESS PORT.
const http = require('http');
const [role, host, port] = process.argv.slice(2);

if (role === 'server') {
  http.createServer((request, response) => request.pipe(response)).listen(Number(port), host);
  process.on('SIGTERM', () => process.exit(0));
} else {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 8 });
  let left = 400;
  for (let i = 0; i < 400; i++) {
    const body = Buffer.alloc([1, 500, 20000, 200000][i % 4], i % 256);
    const request = http.request({ host, port, agent, method: 'POST' }, (response) => {
      const parts = [];
      response.on('data', (part) => parts.push(part));
      response.on('end', () => {
        if (!Buffer.concat(parts).equals(body)) process.exit(1);
        if (--left === 0) process.exit(0);
      });
    });
    request.on('error', (error) => { console.error(error); process.exit(2); });
    request.end(body);
  }
}
