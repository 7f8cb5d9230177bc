"""How many pages a PagedCache's pool gets."""

from functools import partial

import torch

from dmc_fast import PagedCache
from nanodmc.parallel import over_ranks
from nanodmc.sampling import SETTINGS, next_logits, sample

PAGE = 16      # slots in a page, as PagedCache has them unless told otherwise


def page_bytes(config, dtype):
    """Bytes of one page: the keys and the values of its slots."""
    return 2 * PAGE * config.head_dim * dtype.itemsize


def full_pages(config, batch, page_size=PAGE):
    """The pages of a pool in which every head of `batch` sequences has room for all positions."""
    return config.n_layer * batch * config.n_kv_head * -(-config.max_seq_len // page_size)


@torch.no_grad()
def pages_that_fit(model, rows, gigabytes, gain, capped=True, cache_class=PagedCache):
    """How many pages fit into `gigabytes`, and into the memory of each rank.

    gigabytes None: 1 on a CPU. On a GPU all that is free, but for 3% of the memory and for what
    the longest prefill, the sampling of all rows and the cache's other tensors take. capped: no
    more pages than `rows` sequences can fill. gain: as in Transformer.hidden.
    """
    config, weight = model.config, next(model.parameters())
    device, dtype, positions = weight.device, weight.dtype, config.max_seq_len
    memory = 1e9 * (1 if gigabytes is None else gigabytes)
    if weight.is_cuda and gigabytes is None:
        make = partial(cache_class, config, device=device, dtype=dtype)
        cache = make(1, pages=full_pages(config, 1))
        prompt = torch.zeros(1, positions, dtype=torch.long, device=device)
        working = peak(lambda: next_logits(model, prompt, cache, gain))
        cache = None
        logits, ones = weight.new_zeros(rows, config.vocab_size), torch.ones(rows, device=device)
        settings = [ones.to(kind) for kind in SETTINGS.values()]
        working += peak(lambda: sample(logits, *settings, ones.long()))
        working += make(rows, pages=0).bytes.allocated
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        memory = free - working - 0.03 * total
    fit = max(0, int(memory // page_bytes(config, dtype)))
    fit = int(over_ranks(torch.tensor(fit, device=device), "MIN"))
    return min(fit, full_pages(config, rows)) if capped else fit


def peak(work):
    """The bytes of GPU memory that work() takes for a time, beyond what it leaves."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
