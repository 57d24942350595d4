// Serves this folder, and an artefact's folder as /artefact/:   node serve.js ARTEFACT [PORT]
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join } from "node:path";

const [artefact, port = "8123"] = process.argv.slice(2);
const here = import.meta.dirname;
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".json": "application/json", ".wasm": "application/wasm" };
// A page that may have threads.
const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp", "Cache-Control": "no-cache" };

async function find(url) {
  const path = decodeURIComponent(new URL(url, "http://here").pathname);
  const [root, rest] = path.startsWith("/artefact/") ? [artefact, path.slice("/artefact".length)] : [here, path === "/" ? "/index.html" : path];
  if (!root || rest.split(/[/\\]/).some((part) => part.startsWith("."))) return null; // hidden files, and ..
  const file = join(root, rest);
  const found = await stat(file).catch(() => null);
  return found?.isFile() ? { file, size: found.size } : null;
}

const server = createServer(async (request, response) => {
  const found = await find(request.url).catch(() => null);
  if (!found) return response.writeHead(404, HEADERS).end("not found\n");
  response.writeHead(200, { ...HEADERS, "Content-Type": TYPES[extname(found.file)] ?? "application/octet-stream", "Content-Length": found.size });
  createReadStream(found.file).on("error", () => response.destroy()).pipe(response);
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
