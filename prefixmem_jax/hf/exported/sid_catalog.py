"""Items and their Semantic IDs: which may be generated, and what they name.

A Semantic ID (SID) is a tuple of codes, one by level. `items.jsonl` beside this file lists the
catalogue; several items may share a SID.
"""

import json
import operator
from collections import namedtuple

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import cached_file

ITEMS, TRANSITIONS = "items.jsonl", "transitions.npz"
NEIGHBOURS = 64  # of an item that are looked at, the most frequent
NEVER = 1e-9  # a rate or factor of none is as good as this, whose logarithm is a number
# `generate` fills beams that found nothing (more beams than SIDs) with scores of -1e9 or less.
EXHAUSTED = -1e8

Recommendation = namedtuple("Recommendation", "item title sid score key")


class SidSpace:
    """Which token stands for which code of which level."""

    def __init__(self, codebook_sizes, text_tokens):
        self.codebook_sizes = tuple(codebook_sizes)
        self.levels = len(self.codebook_sizes)
        self.bos_token = text_tokens + 1
        self.starts = [text_tokens + 2]  # first token of every level, and one past the last
        for size in self.codebook_sizes:
            self.starts.append(self.starts[-1] + size)

    def encode(self, sid):
        """Tokens of a SID."""
        return [start + code for start, code in zip(self.starts, sid, strict=False)]

    def decode(self, tokens):
        """The SID of its tokens."""
        return tuple(token - start for token, start in zip(tokens, self.starts, strict=False))


class Catalog:
    """Items 0..N-1 with SIDs and titles, and a trie over the SIDs.

    Attributes:
      own_ids: what the items' owner calls them; empty if by number.
      max_items: how much of the end of a history the model was trained with.
      beam: width of its beam search.
      transitions: what stood next to what in training, or None: arrays `first`, `neighbours` and
        `counts` (those of item i are first[i]:first[i + 1]), and `decay`.
    """

    def __init__(self, space, sids, titles, own_ids, max_items, beam, transitions=None):
        self.space = space
        self.own_ids = own_ids
        self.item_of_own_id = {own: item for item, own in enumerate(own_ids)}
        self.max_items = max_items
        self.beam = beam
        self.transitions = transitions
        self.sids = [tuple(sid) for sid in sids]
        self.titles = titles
        self.items = {}
        for item, sid in enumerate(self.sids):
            self.items.setdefault(sid, []).append(item)
        # Level by level, the sorted keys `node * codes + code`; a key's place is the child's node.
        distinct = torch.tensor(sorted(self.items), dtype=torch.int64)
        node = torch.zeros(len(distinct), dtype=torch.int64)
        self.keys = []
        self.leaves = {tuple(sid): leaf for leaf, sid in enumerate(distinct.tolist())}
        for level, size in enumerate(space.codebook_sizes):
            keys, node = torch.unique(node * size + distinct[:, level], return_inverse=True)
            self.keys.append(keys)

    @classmethod
    def from_pretrained(cls, folder, config, **place):
        """Reads the items of an exported folder (or hub repository); `config` is the model's.

        Args:
          place: of a repository, what its model was read with: `revision`, `token`, ...

        Raises:
          ValueError: names the line that is not the item it must be: another one, or without its
            codes.
        """
        described = config.semantic_ids
        space = SidSpace(described["codebook_sizes"], described["text_tokens"])
        sids, titles, own_ids = [], [], []
        path = cached_file(folder, ITEMS, **place)
        with open(path, "rb") as file:
            for item, line in enumerate(file):
                try:
                    sid, title, own_id = _parse_line(line, item, space)
                except ValueError as error:
                    raise ValueError(f"{path}: line {item + 1}: {error}") from None
                sids.append(sid)
                titles.append(title)
                if item and (own_id is None) != (len(own_ids) < item):
                    raise ValueError(
                        f"{path}: line {item + 1}: expected a key on every line, or on none"
                    )
                own_ids += [] if own_id is None else [own_id]
        if len(sids) != described["items"]:
            raise ValueError(f"{path}: {len(sids)} items, expected {described['items']}")
        transitions = None
        if described.get("transition_share"):
            path = cached_file(folder, TRANSITIONS, **place)
            with np.load(path, allow_pickle=False) as saved:
                transitions = {name: saved[name] for name in saved.files}
        return cls(
            space, sids, titles, own_ids, described["max_items"], described["beam"], transitions
        )

    def allowed(self, codes):
        """Which codes may follow: bool [prefixes, codes of the next level].

        Args:
          codes: int64 [prefixes, length], length < levels; of SIDs that start so in the catalogue
            (others may be followed by nothing).
        """
        row, code, _, _ = self.children(codes)
        mask = torch.zeros(len(codes), self.space.codebook_sizes[codes.shape[1]], dtype=torch.bool)
        mask[row, code] = True
        return mask

    def children(self, codes):
        """Every way on from prefixes: its prefix's row, its code, its node, and its prefix's node.

        Nodes of one length are numbered in the order of their prefixes.
        """
        node = torch.zeros(len(codes), dtype=torch.int64)
        known = torch.ones(len(codes), dtype=torch.bool)
        for level in range(codes.shape[1]):
            wanted = node * self.space.codebook_sizes[level] + codes[:, level]
            place = torch.searchsorted(self.keys[level], wanted)
            place = place.clamp(max=len(self.keys[level]) - 1)
            known &= self.keys[level][place] == wanted
            node = place
        size, keys = self.space.codebook_sizes[codes.shape[1]], self.keys[codes.shape[1]]
        first = torch.searchsorted(keys, node * size)
        count = torch.where(known, torch.searchsorted(keys, (node + 1) * size) - first, 0)
        row = torch.repeat_interleave(torch.arange(len(codes)), count)
        within = torch.arange(len(row)) - (torch.cumsum(count, 0) - count)[row]
        child = first[row] + within
        return row, keys[child] % size, child, node[row]

    def whole(self, leaves):
        """By level, the nodes below which there is nothing but these leaves, int64 [any] each."""
        nodes = torch.tensor(sorted(leaves), dtype=torch.int64)
        found = [nodes]
        for keys, size in zip(self.keys[:0:-1], self.space.codebook_sizes[:0:-1], strict=True):
            parents, among = torch.unique(keys[nodes] // size, return_counts=True)
            first, stop = (torch.searchsorted(keys, (parents + i) * size) for i in (0, 1))
            nodes = parents[among == stop - first]
            found.append(nodes)
        return found[::-1]

    def log_masses(self, log_probs, had, returns):
        """By level, the log-probability of all items below each node.

        Args:
          log_probs: of items, float64 [items].
          had, returns: see `transition_masses`.
        """
        probs = log_probs.cpu().exp()
        if returns is not None:
            probs = probs * self._factors(probs, had, returns).clamp(min=NEVER)
        return [mass.log() for mass in self._masses(probs)]

    def transition_masses(self, history, had, returns):
        """By level, how probable the counts of training make the nodes; None where they are silent.

        Args:
          history: items, the newest last.
          had: what the history holds, as leaves.
          returns: how probable it is in all; zero leaves it out.
        """
        if self.transitions is None:
            return None
        first, neighbours, counts = (self.transitions[k] for k in ("first", "neighbours", "counts"))
        said = np.zeros(len(self.sids))
        for since, item in enumerate(reversed(history)):
            own = slice(first[item], first[item + 1])
            most = np.lexsort((neighbours[own], -counts[own]))[:NEIGHBOURS]
            weight = float(self.transitions["decay"]) ** since
            said[neighbours[own][most]] += weight * counts[own][most]
        if not said.any():
            return None
        probs = torch.from_numpy(said / said.sum())
        probs = probs * self._factors(probs, had, returns)
        return self._masses(probs) if probs.any() else None

    def _among(self, had):
        """Whether each item's leaf is among these, bool [items]."""
        return np.isin([self.leaves[sid] for sid in self.sids], list(had))

    def _factors(self, probs, had, returns):
        """Multiplied by them, probabilities of items give what was had `returns` in all."""
        had = torch.from_numpy(self._among(had))
        of_had, of_new = probs[had].sum(), probs[~had].sum()
        # Where one of both is impossible the other has it all, unless it is left out.
        to_had = (returns if of_new > 0 else float(returns > 0)) / (of_had if of_had > 0 else 1.0)
        to_new = (1 - returns if of_had > 0 else 1.0) / (of_new if of_new > 0 else 1.0)
        return torch.where(had, to_had, to_new)

    def _masses(self, by_item):
        """By level, the sums of numbers of items [items] below each node."""
        leaf = torch.tensor([self.leaves[sid] for sid in self.sids])
        mass = torch.zeros(len(self.keys[-1]), dtype=torch.float64)
        masses = [mass.index_add(0, leaf, by_item)]
        for keys, size in zip(self.keys[:0:-1], self.space.codebook_sizes[:0:-1], strict=True):
            parent = keys // size
            mass = torch.zeros(int(parent[-1]) + 1, dtype=torch.float64)
            masses.append(mass.index_add(0, parent, masses[-1]))
        return masses[::-1]

    def recommend(self, model, history, top=10, beams=None, include_seen=False):
        """The best next items after a history of items or their own ids, oldest first.

        Args:
          model: a causal LM that speaks this catalogue's SIDs.
          history: its last `max_items` count.
          beams: width of the beam search, at least `top` (default: `beam`, or `top` if greater).
          include_seen: recommend items of the history too; where the model comes with transitions,
            as often as training histories came back to an item.

        Returns:
          A list of (item, title, sid, score), best first; items that share a SID follow each other.
          The score is the sum over levels of the code's log-probability; where the model has an
          item head, mixed with the log-probability of the SID's items; where it comes with
          transitions, the log of its probability mixed with theirs.
        """
        space = self.space
        given, count = list(history), len(self.sids)
        history = [
            self.item_of_own_id.get(i, -1) if isinstance(i, str) else operator.index(i)
            for i in given
        ]
        unknown = [i for i, item in zip(given, history, strict=True) if not 0 <= item < count]
        if unknown:
            raise ValueError(f"item {unknown[0]} is not in the catalogue of {count} items")
        tokens = [space.bos_token]
        for item in history[-self.max_items :]:
            tokens += space.encode(self.sids[item])
        known, seen = set(history), set() if include_seen else set(history)
        had = {self.sids[item] for item in known}
        had = [self.leaves[sid] for sid in had if known.issuperset(self.items[sid])]
        returns = 0.0
        if include_seen:
            returns = None
            if self.transitions is not None:
                returns = max(float(self.transitions["returns"]), NEVER)
        top = min(top, len(self.sids))
        beams = max(beams or self.beam, top)
        search = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0}
        with torch.no_grad():
            prompt, prior, share = torch.tensor([tokens], device=model.device), None, 0.0
            if getattr(model.config, "item_head", None) is not None:
                items = torch.tensor([space.encode(sid) for sid in self.sids], device=model.device)
                prior = self.log_masses(model.item_log_probs(prompt, items), had, returns)
                share = model.config.semantic_ids["item_share"]
            counted = self.transition_masses(history[-self.max_items :], had, returns)
            gone = () if include_seen else had
            counted_share = model.config.semantic_ids.get("transition_share", 0.0)
            output = model.generate(
                prompt,
                attention_mask=torch.ones(1, len(tokens), dtype=torch.int64, device=model.device),
                max_new_tokens=space.levels,
                do_sample=False,
                logits_processor=LogitsProcessorList(
                    [SidLogitsProcessor(space, self, prior, share, gone, counted, counted_share)]
                ),
                return_dict_in_generate=True,
                output_scores=True,
                **(search if beams > 1 else {}),
            )
        if beams > 1:
            scores = output.sequences_scores
        else:
            scores = model.compute_transition_scores(output.sequences, output.scores).sum(dim=1)
        results = []
        sequences = output.sequences[:, len(tokens) :].tolist()
        for sequence, score in zip(sequences, scores.tolist(), strict=True):
            sid = space.decode(sequence)
            if score < EXHAUSTED or sid not in self.items:
                continue
            for item in (item for item in self.items[sid] if item not in seen):
                own_id = self.own_ids[item] if self.own_ids else str(item)
                results.append(Recommendation(item, self.titles[item], sid, score, own_id))
        return results[:top]


def _parse_line(line, item, space):
    """SID, title and own id of an item; ValueError says why the line does not give them."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    number, sid, title, own_id = (entry.get(key) for key in ("item", "sid", "title", "key"))
    if type(number) is not int or number != item:
        raise ValueError(f"item is {number!r}, expected {item}: 0, 1, 2, ...")
    if not isinstance(sid, list) or len(sid) != space.levels:
        raise ValueError(f"sid is {sid!r}, expected {space.levels} codes")
    for level, (code, size) in enumerate(zip(sid, space.codebook_sizes, strict=True), start=1):
        if type(code) is not int or not 0 <= code < size:
            raise ValueError(f"sid level {level} is {code!r}, expected 0..{size - 1}")
    if title is not None and not isinstance(title, str):
        raise ValueError(f"title is {title!r}, expected a string or null")
    if own_id is not None and not isinstance(own_id, str):
        raise ValueError(f"key is {own_id!r}, expected a string")
    return sid, title, own_id


class SidLogitsProcessor(LogitsProcessor):
    """Lets `generate` write SIDs only: those of a catalogue, or with None any.

    Scores become log-probabilities of the code among its level's codes. Use a fresh one for every
    `generate`: what comes first is the prompt, SIDs follow it one after the other.

    With `prior`, `Catalog.log_masses` of one prompt, they are mixed with what items say: share of
    it, 1 - share of the codes. `excluded` are leaves of the catalogue that must not be written.
    With `counted`, `Catalog.transition_masses` of that prompt, SIDs' probabilities are mixed with
    them: counted_share of these.
    """

    def __init__(
        self,
        space,
        catalog=None,
        prior=None,
        share=0.0,
        excluded=(),
        counted=None,
        counted_share=0.0,
    ):
        self.space = space
        self.catalog = catalog
        self.prior = prior
        self.share = share
        # By level: prefixes of nothing else would take the places of others.
        self.excluded = None if catalog is None else catalog.whole(excluded)
        self.counted = counted
        self.counted_share = counted_share
        self.totals = {}
        self.prompt = None

    def _counted_gains(self, level, codes, gained, row, code, child, node):
        """What each child gains, in the log of the mixed probability of its prefix."""
        share, prefixes = self.counted_share, [tuple(prefix) for prefix in codes.tolist()]
        # The model's own log-probability of each prefix, from the step before.
        own = [self.totals[p[:-1]][p[-1]] if p[:-1] in self.totals else -np.inf for p in prefixes]
        own = torch.tensor(own if level else [0.0] * len(prefixes), dtype=torch.float64)

        def mixed(own, mass):
            return torch.logaddexp(np.log1p(-share) + own, (share * mass).log())

        after = own[row] + gained.double().cpu()
        totals = torch.full(
            (len(prefixes), self.space.codebook_sizes[level]), -float("inf")
        ).double()
        totals[row, code] = after
        self.totals = dict(zip(prefixes, totals.tolist(), strict=True))
        gains = mixed(after, self.counted[level][child])
        return gains - mixed(own[row], self.counted[level - 1][node]) if level else gains

    def __call__(self, input_ids, scores):
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        level = (input_ids.shape[1] - self.prompt) % self.space.levels
        start, stop = self.space.starts[level : level + 2]
        scored = torch.log_softmax(scores[:, start:stop].float(), dim=-1).to(scores.dtype)
        if self.catalog is not None:
            before = input_ids[:, input_ids.shape[1] - level :].cpu()
            codes = before - torch.tensor(self.space.starts[:level], dtype=torch.int64)
            row, code, child, node = self.catalog.children(codes)
            allowed = torch.full_like(scored, -float("inf"))
            gains = scored[row.to(scored.device), code.to(scored.device)]
            if self.prior is not None:
                gained = self.prior[level][child]
                if level > 0:
                    gained = gained - self.prior[level - 1][node]
                gains = (1 - self.share) * gains + self.share * gained.to(gains)
            if self.counted is not None:
                gains = self._counted_gains(level, codes, gains, row, code, child, node).to(gains)
            row, code = row.to(scored.device), code.to(scored.device)
            allowed[row, code] = gains
            out = torch.isin(child, self.excluded[level]).to(scored.device)
            allowed[row[out], code[out]] = -float("inf")
            scored = allowed
        result = torch.full_like(scores, -float("inf"))
        result[:, start:stop] = scored
        return result
