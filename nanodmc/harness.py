"""A model of ours as lm_eval's benchmarks want one: log-likelihoods and generated text."""

from nanodmc import scoring
from nanodmc.cli import installing
from nanodmc.engine import Engine
from nanodmc.files import InputError, listed
from nanodmc.pool import pages_that_fit
from nanodmc.requests import Request
from nanodmc.sampling import chooser, derived_seed, generate

LENGTH = 256                 # tokens to generate at most, unless the task says how many
GENERATED = "tokens generated at most"       # a text that ends early counts as a whole one
SAMPLING = ("temperature", "top_k", "top_p", "seed")


def lm_eval():
    """The package lm_eval. Raises InputError where it is missing."""
    try:
        import lm_eval.api.model
        import lm_eval.utils
    except ImportError:
        raise InputError("--tasks needs the package lm_eval; install it with "
                         f"{installing('lm_eval')}.") from None
    return lm_eval


def adapter(model, tokenizer, gain=None, cache_for=None, seed=0, progress=None):
    """A TemplateLM of lm_eval around a Transformer and its Tokenizer, for `simple_evaluate`.

    gain, cache_for: as in `scoring.score`. With cache_for text is generated one sequence at a time,
    and the length that its budget goes by is that of the prompt and of all tokens allowed after it.
    Without it, an Engine generates. seed: of sampling. progress(what, done, total): called now and
    then. What it makes has `held`: task -> [tokens, slots], the sums over all its requests of what
    went into their caches and of what these held in the end.

    Raises InputError where lm_eval is missing, or where the tokenizer has no token to put before
    a text without context.
    """
    harness, report = lm_eval(), progress or (lambda what, done, total: None)
    first = opening(tokenizer)

    class Adapter(harness.api.model.TemplateLM):
        def __init__(self):
            super().__init__()
            self.held = {}

        @property
        def eot_token_id(self):
            return tokenizer.eos

        @property
        def prefix_token_id(self):
            return first

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            """As transformers does it: with what the template puts first, once."""
            begun = add_special_tokens is None and string.startswith(name_of(tokenizer, first))
            return tokenizer.encode(string, prefix=add_special_tokens is not False and not begun)

        def loglikelihood(self, requests, disable_tqdm=True):
            """(log-likelihood, greedy) of each."""
            scores = super().loglikelihood(requests, disable_tqdm=True)
            for request, one in zip(requests, scores, strict=True):
                self._hold(request, one.tokens, one.slots)
            return [(one.logprob, one.greedy) for one in scores]

        def _loglikelihood_tokens(self, requests, **kwargs):
            return scored([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            """The log-likelihood of each text, in disjoint windows of the model's positions."""
            windows = [self._windows(*request.args) for request in requests]
            scores = iter(scored([pair for pairs in windows for pair in pairs]))
            sums = []
            for request, pairs in zip(requests, windows, strict=True):
                parts = [next(scores) for _ in pairs]
                self._hold(request, sum(p.tokens for p in parts), sum(p.slots for p in parts))
                sums.append(sum(p.logprob for p in parts))
            return sums

        def _windows(self, text):
            ids, utils = self.tok_encode(text, add_special_tokens=False), harness.utils
            return [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(
                ids, first, model.config.max_seq_len, 1)]

        def generate_until(self, requests, disable_tqdm=True):
            """The text that follows each context, up to the first of its stops."""
            asked, stops = [], {}
            for i, request in enumerate(requests):
                context, settings = request.args
                stops[i], count, sampling = read_settings(settings, model.config.max_seq_len)
                ids = self.tok_encode(context) or [first]
                asked.append(Request(ids[count - model.config.max_seq_len:], count, **sampling,
                                     seed=derived_seed(seed, i), key=i))
            through = one_by_one if cache_for else together
            texts = through(model, tokenizer, asked, stops, gain, cache_for, report)
            for i, request in enumerate(requests):
                self._hold(request, *texts[i][1:])
            return [cut(tokenizer.token_bytes(texts[i][0]), stops[i]) for i in range(len(asked))]

        def _hold(self, request, tokens, slots):
            sums = self.held.setdefault(request.task_name, [0, 0])
            sums[0] += tokens
            sums[1] += slots

    def scored(pairs):
        done, total = 0, scoring.work(model, pairs)

        def each_batch(tokens):
            nonlocal done
            done += tokens
            report("tokens scored", done, total)
        return scoring.score(model, pairs, gain, cache_for, each_batch)

    return Adapter()


def opening(tokenizer):
    """The id that opens a text: the one that begins texts, or else ends them."""
    begins = tokenizer.special_ids.get("bos_token_id")
    for i in (begins, *tokenizer.prefix[:1], tokenizer.eos):
        if isinstance(i, int):
            return i
    raise InputError(f"{tokenizer.source} names no token that begins or ends a text, which a "
                     "benchmark's questions need; name one in config.json, as bos_token_id.")


def name_of(tokenizer, i):
    return tokenizer.decode([i], special=True)


def read_settings(settings, positions):
    """Stops, the number of tokens, and temperature, top_k and top_p, from a task's settings.

    Without do_sample, or a temperature in its place, the likeliest token is taken. Raises
    InputError for settings that are not supported.
    """
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    if others := sorted(settings.keys() - known):
        raise InputError(f"a task wants to generate text with {listed(others)}, which is not "
                         "supported here; leave that task out.")
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
    count = min(settings.get("max_gen_toks", LENGTH), positions - 1)
    if not settings.get("do_sample", settings.get("temperature", 0) > 0):
        return stops, count, {"temperature": 0.0}
    return stops, count, {"temperature": float(settings.get("temperature", 1.0)),
                          "top_k": int(settings.get("top_k") or 0),
                          "top_p": float(settings.get("top_p", 1.0))}


def cut(text, stops):
    """Bytes as text, up to the first of the stops."""
    text = text.decode("utf-8", "replace")
    return text[:min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def ended(tokenizer, ids, stops):
    """Whether one of the stops is in the newest tokens, some more than the longest has bytes."""
    stops = [stop.encode() for stop in stops]
    newest = tokenizer.token_bytes(ids[-max(map(len, stops), default=0) - 8:])
    return any(stop in newest for stop in stops)


def together(model, tokenizer, asked, stops, gain, cache_for, report):
    """What follows each Request, by an Engine: key -> (ids, tokens, slots), sums over heads."""
    rows = min(128 if next(model.parameters()).is_cuda else 32, len(asked))
    pages = pages_that_fit(model, rows, None, gain)
    engine, texts = Engine(model, rows, pages, tokenizer.stops, gain), {}
    total = sum(request.count for request in asked)

    def each_step():
        for row, seq in list(engine.running.items()):
            key, held = seq.request.key, engine.known.get(row)
            if held and ended(tokenizer, seq.ids, stops[key]):
                texts[key] = seq.ids, held.fed * engine.all_heads, held.slots
                engine.cancel(key)
        parts = sum(len(seq.ids) for seq in engine.running.values())
        done = sum(request.count for request in asked if request.key in texts)
        report(GENERATED, done + parts, total)

    for result in engine.run(asked, each_step):
        if result.error:
            raise InputError(result.error)
        fed = len(result.request.prompt) + len(result.ids) - (result.finish == "length")
        tokens = fed * engine.all_heads
        texts[result.request.key] = result.ids, tokens, round(tokens / result.cr)
    return texts


def one_by_one(model, tokenizer, asked, stops, gain, cache_for, report):
    """The same as `together`, through a cache of its own for each."""
    weight, config, texts, done = next(model.parameters()), model.config, {}, 0
    for request in asked:
        length, ids = len(request.prompt) + request.count, []
        cache = cache_for(length)(config, 1, weight.device, weight.dtype)
        choose = chooser(**{name: getattr(request, name) for name in SAMPLING})
        for token in generate(model, cache, request.prompt, request.count, choose, tokenizer.stops,
                              gain):
            ids.append(token)
            if ended(tokenizer, ids, stops[request.key]):
                break
        tokens = sum(cache.seen) * config.n_kv_head
        texts[request.key] = ids, tokens, int(cache.lengths.sum())
        done += request.count
        report(GENERATED, done, sum(request.count for request in asked))
    return texts
