"""An LLM with a PrefixMem encoder for Semantic IDs (arXiv 2606.00324), in PyTorch.

At every position whose tokens so far are the codes c_1..c_l of one item, n-grams of that prefix
are hashed to rows of the memory, and `m_l = W_out @ sum over n of concat over h of E[n, h][row]` is
added to the token's input embedding. N-grams may also be of the last whole items and the prefix
after them. Everything else is the stock model.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import cached_file

from .configuration_prefixmem import PrefixMemConfig
from .sid_catalog import ITEMS, TRANSITIONS, Catalog

# Arguments of `from_pretrained` that say where in a repository, or where its copy is.
PLACE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def earlier(x, distance):
    """What stood so many positions earlier, [B, S]; zero before the first."""
    return nn.functional.pad(x, (distance, 0))[:, : x.shape[1]]


class PrefixMemory(nn.Module):
    """Token ids to memory vectors."""

    def __init__(self, config):
        super().__init__()
        memory, sids = config.prefix_memory, config.semantic_ids
        self.orders, self.heads = memory["orders"], memory["heads"]
        self.items = memory.get("items", 0)
        self.rows, self.address = memory["rows"], memory["address"]
        self.multipliers = memory["multipliers"]
        self.token_offset = sids["text_tokens"] + 2
        self.codebook_sizes = tuple(sids["codebook_sizes"])
        # Codes of the prefix before each target level; before level 1 stands a whole item.
        self.lengths = [level - 1 or len(self.codebook_sizes) for level in memory["target_levels"]]
        tables = self.heads * (self.items + (1 if self.address == "full_prefix" else self.orders))
        width = memory["d_mem"] // self.heads
        self.tables = nn.ModuleList(nn.Embedding(self.rows, width) for _ in range(tables))
        self.projection = nn.Linear(memory["d_mem"], config.text_config.hidden_size, bias=False)

    @property
    def window(self):
        """How many tokens before a position its vector depends on."""
        return len(self.codebook_sizes) * (1 + self.items) - 1

    def _prefixes(self, ids):
        """Level l of the prefix at each position [B, S] (0: none), and its codes [B, S, levels]."""
        levels, start = len(self.codebook_sizes), self.token_offset
        level, code = torch.zeros_like(ids), torch.zeros_like(ids)
        for number, size in enumerate(self.codebook_sizes, start=1):
            here = (ids >= start) & (ids < start + size)
            level, code = torch.where(here, number, level), torch.where(here, ids - start, code)
            start += size

        whole = level > 0
        for i in range(1, levels):
            whole &= (earlier(level, i) == level - i) | (i >= level)
        level = torch.where(whole, level, 0)
        codes = torch.zeros(*ids.shape, levels, dtype=torch.int64, device=ids.device)
        for length in range(1, levels + 1):
            for j in range(length):  # c_{j+1} lies (length - 1 - j) positions back
                there = earlier(code, length - 1 - j)
                codes[..., j] = torch.where(level == length, there, codes[..., j])
        return level, codes

    def _last_items(self, level, codes):
        """Yields whether there are k whole items before the prefix, and the k-th last one's codes.

        `level` and `codes` are those of every position.
        """
        levels = len(self.codebook_sizes)
        exist = level > 0
        for number in range(self.items):
            here, item = torch.zeros_like(exist), torch.zeros_like(codes)
            for written in range(levels):  # codes since the last whole item
                back = written + number * levels
                there = (level % levels == written) & (earlier(level, back) == levels)
                here |= there
                shifted = nn.functional.pad(codes, (0, 0, back, 0))[:, : codes.shape[1]]
                item = torch.where(there[..., None], shifted, item)
            exist = exist & here
            yield exist, item

    def _grams(self, level, codes, all_levels):
        """Yields the hash [B, S, heads] of each n-gram and where it exists [B, S]."""
        levels = len(self.codebook_sizes)
        multipliers = torch.tensor(self.multipliers, dtype=torch.int64, device=codes.device)
        multipliers = multipliers.view(-1, levels, self.heads)
        terms = (codes[..., None] * multipliers[0]) & 0xFFFFFFFF  # uint32 with wrap-around
        running = [torch.zeros_like(terms[:, :, 0])]
        for i in range(terms.shape[2]):
            running.append(running[-1] ^ terms[:, :, i])
        running = torch.stack(running, dim=2)  # the XOR over the first n codes

        def first(n):
            index = n.clamp(0, terms.shape[2])[..., None, None].expand(*n.shape, 1, self.heads)
            return running.gather(2, index)[:, :, 0]

        if self.address == "full_prefix":
            yield first(level.clamp(max=self.orders)), level > 0
        for n in range(1, self.orders + 1) if self.address != "full_prefix" else ():
            if self.address == "suffix":
                yield first(level) ^ first(level - n), level >= n
            else:
                yield running[:, :, min(n, terms.shape[2])], level >= n
        hashed = first(level % levels)  # of the prefix after the last whole item
        for number, (exist, item) in enumerate(self._last_items(all_levels, codes)):
            terms = (item[..., None] * multipliers[1 + number]) & 0xFFFFFFFF
            for i in range(levels):
                hashed = hashed ^ terms[:, :, i]
            yield hashed, exist & (level > 0)

    def forward(self, ids):
        """Vectors [B, S, hidden] of token ids [B, S]; zero where there is no active prefix."""
        all_levels, codes = self._prefixes(ids)
        lengths = torch.tensor(self.lengths, device=ids.device)
        level = torch.where(torch.isin(all_levels, lengths), all_levels, 0)
        total = 0
        for number, (hashed, exists) in enumerate(self._grams(level, codes, all_levels)):
            read = [
                self.tables[number * self.heads + head](hashed[..., head] % self.rows)
                for head in range(self.heads)
            ]
            total = total + torch.cat(read, dim=-1) * exists[..., None]
        return self.projection(total)


class PrefixMemPreTrainedModel(PreTrainedModel):
    config_class = PrefixMemConfig
    base_model_prefix = "llm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class PrefixMemForCausalLM(PrefixMemPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.prefix_memory = self.item_head = None
        if config.prefix_memory is not None:
            self.prefix_memory = PrefixMemory(config)
        if config.item_head is not None and config.item_head["vectors"] == "own":
            size = config.text_config.hidden_size
            self.item_head = nn.Linear(size, config.item_head["outputs"], bias=False)
        self._catalog = self._items = None
        self._place = {}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As ever; the catalogue will be read from the same place of a repository."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model._place = {name: kwargs[name] for name in PLACE if name in kwargs}
        return result

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.llm.set_output_embeddings(value)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        prefix_ids=None,
        **kwargs,
    ):
        """As the stock model's, with the memory added to the embeddings of `input_ids`.

        Args:
          inputs_embeds: used as they are; nothing is added.
          prefix_ids: tokens [B, T] that end with `input_ids`. With a cache that holds earlier
            tokens they are needed, since a prefix may have started there; `generate` gives them.
        """
        if inputs_embeds is None:
            if prefix_ids is None:
                if past_key_values is not None and past_key_values.get_seq_length() > 0:
                    raise ValueError("with past_key_values, pass prefix_ids: all tokens so far")
                prefix_ids = input_ids
            inputs_embeds = self._embed(input_ids, prefix_ids)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    def _embed(self, input_ids, prefix_ids):
        embedded, length = self.get_input_embeddings()(input_ids), input_ids.shape[1]
        if self.prefix_memory is None:
            return embedded
        memory = self.prefix_memory(prefix_ids[:, -(length + self.prefix_memory.window) :])
        return embedded + memory[:, -length:].to(embedded.dtype)

    def item_log_probs(self, input_ids, item_ids):
        """Log-probabilities of whole items after a prompt [1, S]: float64 [items].

        Args:
          item_ids: SID tokens of all items, [items, levels].
        """
        hidden = self.llm.model(inputs_embeds=self._embed(input_ids, input_ids)).last_hidden_state
        # Products of float32: steps of bfloat16 would put many items level.
        if self.item_head is not None:
            vectors = self.item_head.weight[: len(item_ids)]
        else:
            vectors = self._item_vectors(item_ids).to(hidden.dtype)
        scores = vectors.float() @ hidden[0, -1].float()
        return torch.log_softmax(scores.double(), dim=-1)

    def _item_vectors(self, item_ids):
        """What the memory adds where items end, [items, hidden]; kept until it changes."""
        parameters = list(self.prefix_memory.parameters())
        state = [(item_ids.shape, p.data_ptr(), p._version) for p in parameters]
        if self._items is None or self._items[0] != state:
            pieces = [self.prefix_memory(piece)[:, -1] for piece in item_ids.split(4096)]
            self._items = state, torch.cat(pieces)
        return self._items[1]

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs["prefix_ids"] = input_ids
        return inputs

    def recommend(self, history, top=10, beams=None, include_seen=False):
        """The best next items after a history of item ids; see `Catalog.recommend`."""
        if self._catalog is None:
            folder = self.config._name_or_path
            self._catalog = Catalog.from_pretrained(folder, self.config, **self._place)
        return self._catalog.recommend(self, history, top, beams, include_seen)

    def save_pretrained(self, save_directory, **kwargs):
        """As ever, with the catalogue."""
        super().save_pretrained(save_directory, **kwargs)
        folder = self.config._name_or_path
        for name in (ITEMS, TRANSITIONS):
            file = cached_file(
                folder, name, _raise_exceptions_for_missing_entries=False, **self._place
            )
            target = Path(save_directory) / name
            if file is not None and not (target.exists() and target.samefile(file)):
                shutil.copyfile(file, target)
