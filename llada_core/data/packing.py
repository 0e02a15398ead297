"""Documents of any length to rows of equal length. Knows ids only."""

import numpy as np

from llada_core.config.data import PretrainData


class Packer:
    """Joins documents into rows of `length` tokens; what is left over starts the next row, however it was cut up.

    `document_ids`, if asked for, number the documents of a row from 0.
    """

    def __init__(self, params: PretrainData) -> None:
        self.params = params
        self._ids = np.zeros(0, np.int64)
        self._documents = np.zeros(0, np.int64)
        self._seen = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> dict[str, list[np.ndarray]]:
        """The rows completed by documents of these lengths whose ids stand one after another in `ids`."""
        numbers = np.repeat(np.arange(self._seen, self._seen + len(lengths)), lengths)
        self._seen += len(lengths)
        self._ids = np.concatenate([self._ids, ids])
        self._documents = np.concatenate([self._documents, numbers])
        return self._take(len(self._ids) // self.params.length * self.params.length)

    def rest(self) -> dict[str, list[np.ndarray]]:
        """The last row, shorter than the others; none if it is to be dropped."""
        return self._take(0 if self.params.drop_tail else len(self._ids))

    def _take(self, tokens: int) -> dict[str, list[np.ndarray]]:
        width = self.params.length
        ids, self._ids = self._ids[:tokens], self._ids[tokens:]
        documents, self._documents = self._documents[:tokens], self._documents[tokens:]
        starts = range(0, tokens, width)
        columns: dict[str, list[np.ndarray]] = {"input_ids": [ids[i : i + width] for i in starts]}
        if self.params.documents:
            columns["document_ids"] = [documents[i : i + width] - documents[i] for i in starts]
        return columns
