"""Vectors of titles without any model: hashed words and pairs of words, reduced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from prefixmem_jax.errors import UserError


class TextVectors:
    """TF-IDF of hashed words and pairs of words, reduced by truncated SVD.

    Attributes:
      arrays: what was fitted, by name, to make one like it.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    @classmethod
    def fit(cls, texts: Sequence[str | None], width: int, seed: int) -> TextVectors:
        """Of these texts; narrower than `width` where they are few.

        Raises:
          UserError: there are no words to speak of.
        """
        counts = _counts(texts)
        words = np.unique(counts.indices)
        width = min(width, len(texts) - 1, len(words) - 1)
        if width < 1:
            raise UserError(
                f"{len(texts)} titles with {len(words)} different words are too few for vectors; "
                "name vectors of your own with --embeddings"
            )
        frequency = np.bincount(counts.indices, minlength=counts.shape[1])[words]
        idf = (np.log((1 + len(texts)) / (1 + frequency)) + 1).astype(np.float32)
        fitted = cls({"words": words, "idf": idf})
        from sklearn.decomposition import TruncatedSVD

        reducing = TruncatedSVD(width, random_state=seed).fit(fitted._weights(counts))
        fitted.arrays["components"] = reducing.components_.astype(np.float32)
        return fitted

    def __call__(self, texts: Sequence[str | None]) -> np.ndarray:
        """Float32 [N, width], of length one; zeros where no word is known."""
        vectors = self._weights(_counts(texts)) @ self.arrays["components"].T
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _weights(self, counts: sparse.csr_array) -> sparse.csr_array:
        weights = sparse.csr_array(counts[:, self.arrays["words"]], dtype=np.float32)
        weights.data = 1 + np.log(weights.data)
        weights = weights * self.arrays["idf"]
        lengths = np.maximum(sparse.linalg.norm(weights, axis=1), 1e-12)
        return sparse.csr_array(sparse.diags_array(1 / lengths.astype(np.float32)) @ weights)


def _counts(texts: Sequence[str | None]) -> sparse.csr_array:
    """How often each hashed word is in each text."""
    from sklearn.feature_extraction.text import HashingVectorizer  # slow to import

    hashing = HashingVectorizer(ngram_range=(1, 2), alternate_sign=False, norm=None)
    return sparse.csr_array(hashing.transform([text or "" for text in texts]))
