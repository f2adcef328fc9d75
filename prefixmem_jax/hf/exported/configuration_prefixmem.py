"""Config of an LLM with a PrefixMem encoder for Semantic IDs (arXiv 2606.00324)."""

from transformers import AutoConfig, PretrainedConfig


class PrefixMemConfig(PretrainedConfig):
    """The LLM's own config, the space of Semantic IDs, and the memory.

    Attributes:
      text_config: config of the stock model.
      semantic_ids: `codebook_sizes` (codes by level), `text_tokens` (the token of level l, code c
        is `text_tokens + 2 + codes of earlier levels + c`; the two are padding and BOS), and what
        `recommend` goes by: how many `items` there are, of how many at the end of a history
        (`max_items`) the model makes use, the width of the beam search (`beam`), and the shares in
        its scores of whole items (`item_share`) and of what stood next to what in training
        (`transition_share`).
      prefix_memory: `target_levels`, `orders`, `items`, `heads`, `rows`, `d_mem`, `address` and the
        hash's `multipliers` [levels * (1 + items)][heads]; the rest says how it was trained. None:
        there is no memory.
      item_head: whose `vectors` score items: the `memory`'s where items end, or its `own`, as many
        as `outputs`, of which the first `items` are items. None: there is none.
    """

    model_type = "prefixmem"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self, text_config=None, semantic_ids=None, prefix_memory=None, item_head=None, **kwargs
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("qwen3")
        self.semantic_ids = semantic_ids
        self.prefix_memory = prefix_memory
        self.item_head = item_head
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.text_config.vocab_size
