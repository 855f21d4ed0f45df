// Runs a WASI program in node, as cargo's runner for wasm32-wasip1: test-cross.sh uses it.
// The program sees the repository (tests read the corpora) and the environment, nothing else.
import { readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { WASI } from "node:wasi";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const [program, ...args] = process.argv.slice(2);
const wasi = new WASI({
  version: "preview1",
  args: [program, ...args],
  env: process.env,
  preopens: { [root]: root },
});
const module = await WebAssembly.compile(await readFile(program));
const instance = await WebAssembly.instantiate(module, wasi.getImportObject());
// At once: node 20 may crash while it takes down a memory of gigabytes, after the tests have passed.
process.exit(wasi.start(instance));
