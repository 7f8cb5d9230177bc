"""A DMC model for Hugging Face's transformers.

This file and dmc.py lie beside the weights, so that whoever has transformers can open them:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

generate() compresses its cache by Algorithm 1, in the plain words of dmc.py: it is there to be
right. What is fast is the project's own generate.py.
"""

from dataclasses import fields

import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .dmc import Cache, Config, Transformer

# what transformers calls the cache: past_key_values, and from 5.2x on cache
CACHE = ({"cache", "past_key_values"} & {f.name for f in fields(CausalLMOutputWithPast)}).pop()
OWN_DECISIONS = "dmc-hardc", "uniform", "nvidia", "fmp"       # variants that dmc.py does not know


class DMCLlamaConfig(PretrainedConfig):
    """What config.json holds; the section "dmc" has the settings of the method."""

    model_type = "dmc_llama"

    def __init__(self, tie_word_embeddings=False, **facts):      # what it is where nobody says
        super().__init__(tie_word_embeddings=tie_word_embeddings, **facts)

    def for_dmc(self):
        """The Config of dmc.py. Raises ValueError for a variant that is not in dmc.py."""
        method = self.dmc
        if method.get("variant") in OWN_DECISIONS:
            raise ValueError(f"this model is of the variant {method['variant']}, which works with "
                             "the project's own generate.py only; use that.")
        facts = vars(self)                      # transformers 5, and 4
        rope = dict(facts.get("rope_parameters") or facts.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or facts.get("rope_theta", 10000.0)
        if rope.get("rope_type", "default") == "default":
            rope = None
        return Config(
            vocab_size=self.vocab_size, n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads, n_kv_head=self.num_key_value_heads,
            dim=self.hidden_size, ffn_dim=self.intermediate_size, head_dim=self.head_dim,
            norm_eps=self.rms_norm_eps, rope_theta=theta, rope_scaling=rope,
            max_seq_len=self.max_position_embeddings, tie_embeddings=self.tie_word_embeddings,
            dmc=True, window=method["window"], tau=method["tau"], c=method["c"],
            control_pair=method.get("control_pair", 0))


def alike(padding):
    """The numbers of the rows with equally much padding on the left: a tensor for each amount."""
    return [(padding == n).nonzero()[:, 0] for n in padding.unique()]


class Memory:
    """The caches of a batch. Sequences with equally much padding on the left share one.

    rows: a tensor of row numbers for each cache. seen: columns so far, padding included.
    """

    is_compileable, is_linear = False, (False,)          # what transformers asks of a cache

    def __init__(self, config, padding, weight):
        self.rows = alike(padding)
        self.caches = [Cache(config, len(rows), weight.device, weight.dtype) for rows in self.rows]
        self.seen = 0

    def get_seq_length(self, layer_idx=0):
        return self.seen

    @property
    def compression_ratio(self):
        """Tokens seen / slots used, over all layers, sequences and heads."""
        tokens = sum(sum(cache.seen) * cache.lengths[0].numel() for cache in self.caches)
        return tokens / sum(cache.lengths.sum().item() for cache in self.caches)

    def reorder_cache(self, beam_idx):
        raise ValueError("a compressed cache cannot be reordered; leave out num_beams.")

    def crop(self, max_length):
        raise ValueError("a compressed cache cannot be cut; leave out assisted generation.")


class DMCLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    """The Transformer of dmc.py. Beam search and assisted generation do not work."""

    config_class = DMCLlamaConfig
    _is_stateful = True                                  # refuses what needs an older cache
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.method = config.for_dmc()
        self.model = Transformer(self.method)
        self.lm_head = self.model._modules.pop("lm_head")        # beside it, as in the weights
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                                     # the first forward pass makes its own

    def _init_weights(self, module):
        """Nothing: dmc.py has drawn them."""

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, cache=None,
                                      past_key_values=None, **kwargs):
        memory = past_key_values if cache is None else cache
        if memory is not None and memory.seen < input_ids.size(1):
            input_ids = input_ids[:, memory.seen:]       # what it has not seen yet
        return {"input_ids": input_ids, CACHE: memory, "attention_mask": attention_mask,
                "use_cache": kwargs.get("use_cache", True)}

    def forward(self, input_ids, attention_mask=None, labels=None, cache=None,
                past_key_values=None, use_cache=False, logits_to_keep=0, num_items_in_batch=None,
                return_dict=True, **kwargs):
        """input_ids (B, T). Padding of attention_mask (B, T so far) is on the left, or ignored.

        labels (B, T): those at -100 do not count; the loss is that of the next tokens.
        Raises ValueError for arguments that have no meaning here.
        """
        memory = past_key_values if cache is None else cache
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("this model takes input_ids; leave out inputs_embeds.")
        padding = self.padding(input_ids, attention_mask, memory)
        if memory is None and use_cache:
            memory = Memory(self.method, padding, self.lm_head.weight)
        hidden = self.lm_head.weight.new_zeros(*input_ids.shape, self.method.dim)
        if memory is None:
            parts = [(rows, None) for rows in alike(padding)]
        else:
            parts = zip(memory.rows, memory.caches, strict=True)
            memory.seen += input_ids.size(1)
        for rows, own in parts:
            start = padding[rows[0]]
            hidden[rows, start:] = self.model.hidden(input_ids[rows, start:], own)[0]
        logits = self.lm_head(hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int)
                              else hidden[:, logits_to_keep])
        loss = None
        if labels is not None:
            mean = num_items_in_batch is None
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                                   reduction="mean" if mean else "sum")
            loss = loss if mean else loss / num_items_in_batch
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: memory})
        return output if return_dict else output.to_tuple()

    def padding(self, input_ids, attention_mask, memory):
        """How many of the columns that come now are padding on the left, in each row (B,)."""
        if attention_mask is None or memory is not None:        # later ones have none
            return input_ids.new_zeros(len(input_ids))
        mask = attention_mask[:, -input_ids.size(1):].long()
        if mask.dim() != 2 or not mask.any(1).all():
            raise ValueError("attention_mask is to be (B, T), with a token in every row.")
        start = mask.argmax(1)
        if (mask.diff(dim=1) > 0).sum(1).gt(start > 0).any():
            raise ValueError("attention_mask has holes; padding is to be on the left.")
        return start
