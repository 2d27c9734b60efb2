"""A server on loopback that answers as vLLM's does, from a table; and lies in one way if asked.

The teacher is a table of the next token's logits by the token before. The shapes of answers are
those of vLLM 0.32 in data/others/vllm-*.jsonl.
"""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from fakes import TOKENS, VOCAB_SIZE

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
CONTEXT = 64


def table(seed=7, noise=0.0):
    logits = np.random.default_rng(seed).normal(0.0, 2.0, (VOCAB_SIZE, VOCAB_SIZE))
    logits += noise * np.random.default_rng(1).normal(0.0, 1.0, logits.shape)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


TABLE, OTHER_TABLE = table(), table(noise=0.3)


def text_of(ids):
    return " ".join(TOKENS[i] for i in ids)


class TableServer(ThreadingHTTPServer):
    """Answers from the table; `lie` names what it does wrong, `fault_share` how often it fails."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, lie="", *, max_logprobs=30, has_generate=True, jitter=0.0, honest_first=0):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.lie, self.max_logprobs, self.has_generate = lie, max_logprobs, has_generate
        self.jitter = jitter  # nats, of an honest server whose batches differ
        self.honest_first = honest_first  # answers before the lies begin
        self.fault_share = 0.0
        self.rng = np.random.default_rng(0)
        self.lock = threading.Lock()
        self.num_answers = self.num_faults = self.num_at_once = self.most_at_once = 0
        self.asked = []  # bodies answered

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the play."""

    def says(self, lie):
        return self.lie == lie and self.num_answers > self.honest_first


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def send(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        context = 20 if self.server.lie == "context" else CONTEXT
        models = [{"id": "table", "max_model_len": context}]
        if self.server.lie == "models":
            models.append({"id": "other", "max_model_len": context})
        if self.server.lie == "loading":
            models = []
        if self.server.lie == "root":
            models[0]["root"] = "/models/chair"
        answers = {"/v1/models": {"object": "list", "data": models}, "/version": {"version": "1"}}
        if self.path in answers:
            return self.send(answers[self.path])
        return self.send({"error": {"message": "Not Found"}}, 404)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            fails = server.rng.random() < server.fault_share
            server.num_faults += fails
            kind = int(server.rng.integers(2))
            server.num_at_once += 1
            server.most_at_once = max(server.most_at_once, server.num_at_once)
        try:
            if fails and kind:
                return self.send({"error": {"message": "overloaded"}}, 503)
            if fails:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            return self.answer(body)
        finally:
            with server.lock:
                server.num_at_once -= 1

    def answer(self, body):
        server = self.server
        if self.path == GENERATE and not server.has_generate:
            return self.send({"error": {"message": "Scale-out endpoints are disabled"}}, 403)
        if self.path == GENERATE and server.lie == "501":
            return self.send({"error": {"message": "not implemented"}}, 501)
        if server.lie == "key" and self.headers["Authorization"] != "Bearer abc":
            return self.send({"error": {"message": "who are you"}}, 401)
        if server.lie == "prompt":
            return self.send({"error": {"message": "this prompt is no good"}}, 400)
        settings = body.get("sampling_params", body)
        ids = body.get("token_ids") or body.get("prompt")
        for name in ("logprobs", "prompt_logprobs"):
            if (settings.get(name) or 0) > server.max_logprobs:
                said = f"Requested {name} of {settings[name]}, which is greater than max allowed"
                return self.send({"error": {"message": said}}, 400)
        with server.lock:
            server.num_answers += 1
            number = server.num_answers
            server.asked.append(body)
        return self.send(_answer(server, self.path, number, ids, settings))


def _answer(server, path, number, ids, settings):
    logprobs = TABLE
    if server.says("replica") and number % 2:
        logprobs = OTHER_TABLE
    if server.jitter:
        logprobs = logprobs + np.random.default_rng(number).normal(0, server.jitter, logprobs.shape)
        logprobs = logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    max_tokens = settings["max_tokens"]
    if server.says("cap"):
        max_tokens = min(max_tokens, 3)
    rng = np.random.default_rng(settings.get("seed", 0))
    new, finish = [], "length"
    for _ in range(max_tokens):
        row = logprobs[(ids + new)[-1]]
        if settings["temperature"] == 0:
            token = int(row.argmax())
        else:
            token = int(rng.choice(VOCAB_SIZE, p=np.exp(row) / np.exp(row).sum()))
        new.append(token)
        if token in settings["stop_token_ids"]:
            finish = "stop"
            break
    whole = ids + new
    top = {"logprobs": settings.get("logprobs"), "prompt": settings.get("prompt_logprobs")}
    shown = [
        _row(server, logprobs[whole[t - 1]], whole[t], top["logprobs"], settings)
        for t in range(len(ids), len(whole))
        if top["logprobs"]
    ]
    given = None
    if top["prompt"] and server.lie != "no prompt logprobs":
        given = [None] + [
            {
                str(i): {"logprob": p, "rank": 1, "decoded_token": TOKENS[i]}
                for i, p in _row(server, logprobs[ids[t - 1]], ids[t], top["prompt"], settings)
            }
            for t in range(1, len(ids))
        ]
    echoed = [0, *ids] if server.says("begin") else ids
    text = text_of([(i + server.says("tokenizer")) % VOCAB_SIZE for i in new])
    choice = {"index": 0, "finish_reason": finish, "token_ids": new, "text": text}
    if path == GENERATE:
        content = [
            {
                "token_id": own[0], "logprob": own[1],
                "top_logprobs": [{"token_id": i, "logprob": p} for i, p in row[:top["logprobs"]]],
            }
            for row in shown
            for own in row[:1]
        ]  # fmt: skip
        choice["logprobs"] = {"content": content} if shown else None
        return {"choices": [choice], "prompt_logprobs": given, "prompt_token_ids": echoed}
    choice["logprobs"] = {
        "tokens": [f"token_id:{row[0][0]}" for row in shown],
        "token_logprobs": [row[0][1] for row in shown],
        "top_logprobs": [{f"token_id:{i}": p for i, p in row} for row in shown],
    } if shown else None  # fmt: skip
    return {"choices": [choice | {"prompt_logprobs": given, "prompt_token_ids": echoed}]}


def _row(server, row, token, top_k, settings):
    """(id, logprob), the token itself first, then the rest of the K most probable."""
    row = row.copy()
    if server.says("processed") and settings["temperature"] not in (0, 1):
        row = row / settings["temperature"]
        row = row - np.logaddexp.reduce(row)
    best = np.argsort(-row)[:top_k]
    if server.says("renormalised"):
        row = row - np.logaddexp.reduce(row[list({token, *best.tolist()})])
    if server.says("logits"):
        row = row + 9.0
    ids = [token, *(int(i) for i in best if i != token)]
    if server.says("ranks"):
        best = best[:5]
    known = {token, *best.tolist()}
    return [(i, float(row[i]) if i in known else -9999.0) for i in ids]


@contextmanager
def table_server(lie="", **settings):
    """A running server; its address is `url`."""
    server = TableServer(lie, **settings)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
