"""Measure sample.py's decoding beside transformers' generate: same weights, one process, taking turns.

    python tests/race_decoding.py one             # a 124M LLaMA shape, batch 1: bf16, int8, int4
    python tests/race_decoding.py small out/python      # the default checkpoint at batch 1, 8 and 32, fp32
    python tests/race_decoding.py unequal         # eight prompts of unequal length, and prefill of 512 tokens
    python tests/race_decoding.py queue out/python      # a thousand prompts against a batch that is always full
    python tests/race_decoding.py serve out/python      # a hundred requests of 32 clients, beside the engine
    python tests/race_decoding.py cache           # with a cache and without, at 64 to 4,096 tokens

Each line of the output is a JSON object; figures are medians over the rounds. --device cuda for a GPU.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import Config, Transformer, config_to_hf, load_model, multiply_row, synchronize, to_disk

import torch

import sample
from sample import Choice, Engine, Quantizer, Reader, Request, Step, bytes_of

SHAPE = Config(n_layer=12, n_embd=768, n_head=12, n_kv_head=12, head_dim=64, ffn_dim=2048, vocab_size=50304,
               seq_len=4608, tie=True, qk_norm=False)

def tell(**facts) -> None:
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}), flush=True)

def random_model(dtype, kind=None):
    """Build the 124M shape with random weights; the seed is always the same."""
    net = Transformer(SHAPE).init_weights().eval()
    if kind is None:
        return net.to(DEVICE, dtype)
    weights = dict(net.named_parameters())
    quantizer = Quantizer(kind)
    with torch.device("meta"):
        small = Transformer(SHAPE)
    quantizer.prepare(small)
    found = {}
    for name, weight in weights.items():
        found |= quantizer.pack(name, weight.detach(), dtype)
    small.load_state_dict({name: x.to(DEVICE) for name, x in found.items()}, assign=True)
    for module in small.modules():
        if isinstance(module, sample.Int4):
            module.arrange()
    return small.eval()

def theirs(net):
    """Make transformers' model of the same weights."""
    import transformers

    hf = config_to_hf(net.config)
    hf = transformers.AutoConfig.for_model(**hf)
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=next(net.parameters()).dtype).to(DEVICE)
    result = model.load_state_dict(to_disk(dict(net.state_dict()), net.config), strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    return model.eval()

def generate_theirs(model, prompts, new):
    """Time transformers' generate on left-padded prompts -> seconds, ids."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    synchronize(DEVICE)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                             pad_token_id=0, eos_token_id=None)
    synchronize(DEVICE)
    return time.perf_counter() - start, out[:, longest:].tolist()

def generate_ours(engine, prompts, new):
    """Time the engine on the same prompts -> seconds, ids."""
    greedy = Choice(temperature=0)
    engine.held = [[] for _ in engine.running]  # nothing is left of the last round
    start = time.perf_counter()
    requests = [engine.submit(Request(prompt, new, greedy)) for prompt in prompts]
    while engine.busy:
        engine.step()
    return time.perf_counter() - start, [request.new for request in requests]

def prompts_of(lengths, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]

def race(jobs: dict, rounds: int) -> dict[str, list]:
    """Run the jobs in turn; the first round warms up -> seconds of each, and what each gave last."""
    seconds = {name: [] for name in jobs}
    gave = {}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            taken, gave[name] = job()
            if i:
                seconds[name].append(taken)
    return seconds, gave

def summary(seconds, tokens: int) -> dict:
    return {name: round(tokens / statistics.median(values), 1) for name, values in seconds.items()} | {
        f"{name}_range": [round(tokens / max(values), 1), round(tokens / min(values), 1)]
        for name, values in seconds.items()}

def read_rate() -> float:
    """Measure what a step's product of one row reads alone, in GB/s: bfloat16, matrices of this shape."""
    options = {"cpp.enable_floating_point_contract_flag": "fast"}  # as in sample.py
    step = torch.compile(lambda w, x: multiply_row(x, w), options=options)
    matrices = [torch.randn(2048, 768, device=DEVICE).bfloat16() for _ in range(40)]
    x = torch.randn(1, 768, device=DEVICE).bfloat16()
    times = []
    for _ in range(12):
        synchronize(DEVICE)
        start = time.perf_counter()
        for w in matrices:
            step(w, x)
        synchronize(DEVICE)
        times.append(time.perf_counter() - start)
    return sum(w.nbytes for w in matrices) / statistics.median(times[2:]) / 1e9

def one(new=128, rounds=5):
    """Batch 1 of the 124M shape."""
    net = random_model(torch.bfloat16)
    peer = theirs(net)
    prompts = prompts_of([16], SHAPE.vocab_size)
    models = {"bf16": net} | {kind: random_model(torch.bfloat16, kind) for kind in ("int8", "int4")}
    engines = {name: Engine(model, 1, 1024, True) for name, model in models.items()}
    engines["bf16, eager"] = Engine(net, 1, 1024, False)
    jobs = {"transformers": lambda: generate_theirs(peer, prompts, new)}
    for name, engine in engines.items():
        start = time.perf_counter()
        engine.warm_up()
        tell(warm_up=name, seconds=time.perf_counter() - start)
        jobs[name] = lambda engine=engine: generate_ours(engine, prompts, new)
    before = read_rate()
    seconds, gave = race(jobs, rounds)
    rates = summary(seconds, new)
    same = next((i for i, (a, b) in enumerate(zip(gave["transformers"][0], gave["bf16"][0], strict=True)) if a != b), new)
    tell(what="124M, batch 1, 16 + 128 tokens", tok_per_s=rates, tokens_alike=same,
         product_gb_per_s=[round(before, 1), round(read_rate(), 1)])
    for name, model in models.items():
        matrices = bytes_of(model) - (0 if name == "bf16" else model.embed_tokens.weight.nbytes)
        tell(what=name, mb_read_a_token=matrices / 1e6, gb_per_s=matrices * rates[name] / 1e9)

def small(folder, new=200, rounds=5):
    """The default checkpoint at batch 1, 8 and 32."""
    net = load_model(folder, DEVICE, torch.float32)
    peer = theirs(net)
    for B in (1, 8, 32):
        prompts = prompts_of([16] * B, net.config.vocab_size)
        engine = Engine(net, B, 256, True)
        engine.warm_up()
        eager = Engine(net, B, 256, False)
        seconds, gave = race({"transformers": partial(generate_theirs, peer, prompts, new),
                              "compiled": partial(generate_ours, engine, prompts, new),
                              "eager": partial(generate_ours, eager, prompts, new)}, rounds)
        alike = sum(a == b for a, b in zip(gave["transformers"], gave["compiled"], strict=True))
        tell(what=f"{folder}, fp32, batch {B}, 16 + {new} tokens", tok_per_s=summary(seconds, B * new),
             texts_alike=alike)

def unequal(new=128, rounds=3):
    """Eight prompts of unequal length; then prefill."""
    net = random_model(torch.bfloat16)
    peer = theirs(net)
    prompts = prompts_of([8, 16, 32, 64, 96, 128, 192, 256], SHAPE.vocab_size)
    engine = Engine(net, 8, 1024, True)
    engine.warm_up()
    seconds, _ = race({"transformers": lambda: generate_theirs(peer, prompts, new),
                       "compiled": lambda: generate_ours(engine, prompts, new)}, rounds)
    tell(what="124M bf16, 8 prompts of 8 to 256, 128 new tokens", tok_per_s=summary(seconds, 8 * new))
    for T in (512, 2048):
        ids = torch.tensor(prompts_of([T], SHAPE.vocab_size), device=DEVICE)

        def their_prefill(ids=ids):
            synchronize(DEVICE)
            start = time.perf_counter()
            with torch.inference_mode():
                peer(ids, use_cache=True, logits_to_keep=1)
            synchronize(DEVICE)
            return time.perf_counter() - start, None

        def our_prefill(ids=ids):
            reader = Reader(net)
            synchronize(DEVICE)
            start = time.perf_counter()
            reader.read(ids)
            synchronize(DEVICE)
            return time.perf_counter() - start, None

        seconds, _ = race({"transformers": their_prefill, "ours": our_prefill}, 7)
        tell(what=f"prefill of {T} tokens, seconds", **{k: statistics.median(v) for k, v in seconds.items()})

def queue(folder, rows=32, texts=1000):
    """A thousand prompts of random lengths against batches that begin and end together."""
    net = load_model(folder, DEVICE, torch.float32)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 64, (texts,), generator=generator).tolist()
    news = torch.randint(16, 180, (texts,), generator=generator).tolist()
    prompts = prompts_of(lengths, net.config.vocab_size)
    engine = Engine(net, rows, 256, True)
    engine.warm_up()
    mean = sum(news) // texts
    full = [p * 3 for p in prompts[:rows]]
    full = [p[: sum(lengths) // texts] for p in full]

    def static():
        seconds = [generate_ours(engine, full, mean)[0] for _ in range(4)]
        return 4 * rows * mean / sum(seconds)

    rates = [static()]
    greedy = Choice(temperature=0)
    engine.held = [[] for _ in engine.running]
    start = time.perf_counter()
    requests = [engine.submit(Request(p, n, greedy)) for p, n in zip(prompts, news, strict=True)]
    steps = busy = 0
    while engine.busy:
        busy += len(engine.step())
        steps += 1
    rate = sum(news) / (time.perf_counter() - start)
    rates.append(static())
    assert all(len(r.new) == n for r, n in zip(requests, news, strict=True))
    tell(what=f"{texts} prompts of 4 to 63, 16 to 179 new tokens, {rows} rows", tok_per_s=rate, full_batch=rates,
         share=rate / statistics.mean(rates), rows_in_use=busy / steps / rows)

def ask(address, prompt, new):
    """Stream a completion -> seconds until the first text, number of tokens."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection(*address, timeout=120)
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    answer.readline()
    first = time.perf_counter() - start
    last = [line for line in answer.read().split(b"\n") if line.startswith(b"data: {")][-1]
    return first, json.loads(last[6:])["usage"]["completion_tokens"]

def run_clients(address, prompts, news, clients):
    """Ask with so many clients at once; in a process of its own, as clients are."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(partial(ask, address), prompts, news))

def serve(folder, rows=32, clients=32, texts=100):
    """A hundred requests of 32 clients at once through HTTP, beside the engine with the same texts."""
    o = sample.ServeOptions(Path(folder), port=0, rows=rows, device=str(DEVICE), context=256)
    server, service = sample.make_server(Path(folder), o)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    service.stop = frozenset()  # every text is as long as was asked for
    engine = service.engine
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, 64, (texts,), generator=generator).tolist()
    news = torch.randint(16, 180, (texts,), generator=generator).tolist()
    prompts = prompts_of(lengths, 4000)

    def direct():
        engine.held = [[] for _ in engine.running]
        start = time.perf_counter()
        requests = [service.submit(Request(p, n, Choice(temperature=0)))
                    for p, n in zip(prompts, news, strict=True)]
        for request in requests:
            while request.out.get()[1] is None:
                pass
        return time.perf_counter() - start, sum(len(r.new) for r in requests)

    def through_http(pool):
        engine.held = [[] for _ in engine.running]
        start = time.perf_counter()
        answers = pool.apply(run_clients, (server.server_address[:2], prompts, news, clients))
        return time.perf_counter() - start, answers

    def measure():
        rates = {"engine": [], "http": []}
        pool = multiprocessing.get_context("spawn").Pool(1)
        pool.apply(len, ([],))  # it has started
        for _ in range(4):
            seconds, tokens = direct()
            rates["engine"].append(tokens / seconds)
            seconds, answers = through_http(pool)
            rates["http"].append(sum(count for _, count in answers) / seconds)
            assert sum(count for _, count in answers) == tokens
        first = sorted(latency for latency, _ in answers)
        tell(what=f"{texts} requests of {clients} clients, {rows} rows", tok_per_s=rates,
             share=statistics.median(rates["http"]) / statistics.median(rates["engine"]),
             first_text_s={"median": first[texts // 2], "slowest": first[-1]})
        os._exit(0)

    threading.Thread(target=measure).start()
    service.work()

def time_read(reader, token, before=None):
    """Time the reading of a token behind a text; before: the text, where it would otherwise grow."""
    if before is not None:
        reader.ids = before
    start = time.perf_counter()
    reader.read(token)
    synchronize(DEVICE)
    return time.perf_counter() - start, None

def cache():
    """What the cache saves, at 64 to 4,096 tokens; its bytes."""
    net = random_model(torch.bfloat16)
    step = Step(net, True)
    for T in (64, 256, 1024, 4096):
        ids = torch.tensor(prompts_of([T], SHAPE.vocab_size), device=DEVICE)
        whole = Reader(net, cached=False)
        kept = Reader(net, step=step, slots=4300)
        kept.read(ids)
        eager = Reader(net)
        eager.read(ids)
        start = time.perf_counter()
        Reader(net).read(ids)
        synchronize(DEVICE)
        prefill = time.perf_counter() - start
        token = ids[:, :1].clone()  # strides as in decoding: others would be compiled anew

        slow, _ = race({"without": partial(time_read, whole, token, ids[:, :-1])}, 2 if T > 1024 else 5)
        fast, _ = race({"compiled": partial(time_read, kept, token), "eager": partial(time_read, eager, token)},
                       40)
        ms = {name: statistics.median(v) * 1e3 for name, v in (slow | fast).items()}
        heads, *widths = SHAPE.cached
        tell(tokens=T, prefill_ms=prefill * 1e3, ms={k: round(v, 2) for k, v in ms.items()},
             times=ms["without"] / ms["compiled"], cache_mb=SHAPE.n_layer * heads * sum(widths) * T * 2 / 1e6)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["one", "small", "unequal", "queue", "serve", "cache"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    DEVICE = torch.device(o.device)
    globals()[o.what](*filter(None, [o.folder]))
