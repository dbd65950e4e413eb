// The whole flow with the official Node SDK; says what it saw as one JSON object.
// Arguments: the base URL, a good API key, how many further batches to make for paging, a folder for a file.
import fs from "node:fs";
import path from "node:path";
import OpenAI, { toFile } from "openai";
import { VERSION } from "openai/version";

const [url, key, more, folder] = process.argv.slice(2);
const lines = ["one", "two \u2028 three", "[[simulate status=400]]"].map((prompt, i) =>
  JSON.stringify({
    custom_id: `r${i}`,
    method: "POST",
    url: "/v1/chat/completions",
    body: { model: "m", messages: [{ role: "user", content: prompt }] },
  }),
);
const data = Buffer.from(lines.join("\n"));
const saw = { version: VERSION };
const client = new OpenAI({ baseURL: url, apiKey: key });

async function failing(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return {
      class: error.constructor.name,
      status: error.status,
      code: error.code,
      param: error.param,
      request_id: Boolean(error.requestID),
    };
  }
  throw new Error("it did not fail");
}
async function bytesOf(id) {
  return Buffer.from(await (await client.files.content(id)).arrayBuffer());
}

const name = path.join(folder, "input.jsonl");
fs.writeFileSync(name, data);
const file = await client.files.create({
  file: fs.createReadStream(name),
  purpose: "batch",
  expires_after: { anchor: "created_at", seconds: 3600 },
});
saw.file = [file.object, file.bytes === data.length, file.filename, file.purpose, file.status];
saw.expires = file.expires_at - file.created_at;
saw.buffer = (await client.files.create({ file: await toFile(data, "b.jsonl"), purpose: "batch" })).filename;
saw.waited = (await client.files.waitForProcessing(file.id, { pollInterval: 100, maxWait: 5000 })).status;
saw["same bytes"] = data.equals(await bytesOf(file.id));

let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
  metadata: { job: "flow" },
});
saw.created = [batch.object, batch.status, batch.metadata, Boolean(batch.expires_at)];
const deadline = Date.now() + 60000;
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  if (Date.now() > deadline) throw new Error(JSON.stringify(batch));
  await new Promise((resolve) => setTimeout(resolve, 50));
  batch = await client.batches.retrieve(batch.id);
}
const counts = batch.request_counts;
saw.ended = [batch.status, counts.total, counts.completed, counts.failed];
const answer = await client.files.content(batch.output_file_id);
saw.headers = [answer.headers.get("x-last-line"), answer.headers.get("x-incomplete")];
let text = "";
const decoder = new TextDecoder();
for await (const piece of answer.body) text += decoder.decode(piece, { stream: true });
saw.output = text.trimEnd().split("\n").map((line) => JSON.parse(line).custom_id).sort();
const error = JSON.parse((await bytesOf(batch.error_file_id)).toString());
saw["error line"] = [error.custom_id, error.response.status_code, Object.keys(error.error).sort()];

saw["cancel finished"] = await failing(() => client.batches.cancel(batch.id));
saw["unknown batch"] = await failing(() => client.batches.retrieve("batch_" + "0".repeat(32)));
saw["unknown file"] = await failing(() => client.files.retrieve("file-nothing"));
saw["bad window"] = await failing(() =>
  client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "25h" }),
);
saw["wrong key"] = await failing(() => new OpenAI({ baseURL: url, apiKey: "sk-wrong" }).batches.list());

const invalid = await client.files.create({ file: await toFile(Buffer.from("nonsense\n"), "bad.jsonl"), purpose: "batch" });
const over = { input_file_id: invalid.id, endpoint: "/v1/chat/completions", completion_window: "24h" };
const failed = await client.batches.create(over);
saw.failed = [failed.status, failed.errors.data[0].code, failed.errors.data[0].line];
const made = new Set([batch.id, failed.id]);
for (let i = 0; i < Number(more); i++) made.add((await client.batches.create(over)).id);
const found = [];
for await (const one of client.batches.list({ limit: 20 })) found.push(one.id);
saw.paged = [found.length, new Set(found).size, [...made].every((id) => found.includes(id))];
saw["empty page"] = (await client.batches.list({ after: found.at(-1) })).data.length;

const upload = await client.uploads.create({
  bytes: data.length,
  filename: "parts.jsonl",
  mime_type: "application/jsonl",
  purpose: "batch",
});
const half = data.length >> 1;
const [second, first] = await Promise.all([
  client.uploads.parts.create(upload.id, { data: await toFile(data.subarray(half), "part") }),
  client.uploads.parts.create(upload.id, { data: await toFile(data.subarray(0, half), "part") }),
]);
const done = await client.uploads.complete(upload.id, { part_ids: [first.id, second.id] });
saw.uploaded = [upload.status, done.status, data.equals(await bytesOf(done.file.id))];

saw.deleted = (await client.files.delete(file.id)).deleted;
saw.gone = await failing(() => client.files.content(file.id));
console.log(JSON.stringify(saw));
