"""The continuous cache: words that recently followed similar outputs become likelier.

"Improving Neural Language Models with a Continuous Cache", arXiv 1612.04426; the pointer of arXiv
1708.02182, section 5.
"""

import torch
from torch import Tensor

# A block of b queries needs b * (b + window) numbers at a time.
_BLOCK = 512


class ContinuousCache:
    """The last `window` outputs and the words that followed them.

    At position t, with outputs `h` and following words `w`, over the last `window` positions i < t:
    `p(word) ~ sum_i [w_i = word] * exp(theta * h_t . h_i)`. Only the probability of the actual next
    word is computed, in time and memory proportional to the window, not to the vocabulary.

    The cache is in use once more than `window` positions have been seen, as in the original, or
    with `from_start` once one position has been seen.
    """

    def __init__(self, window: int, theta: float, from_start: bool = False) -> None:
        self.window = window
        self.theta = theta
        self.from_start = from_start
        self.seen = 0
        self._keys: Tensor | None = None
        self._words: Tensor | None = None

    def target_prob(self, outputs: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's probability of each word given the ones before it; then store them all.

        `outputs` (n, size) are the model's raw outputs at n successive positions, `words` (n,) the
        words that follow. Returns the probabilities (n,) and whether the cache is in use (n,);
        where it is not, the probability is 0.
        """
        keys = outputs if self._keys is None else torch.cat([self._keys, outputs])
        history = words if self._words is None else torch.cat([self._words, words])
        row = torch.arange(len(keys), device=outputs.device)
        unused = max(0, (0 if self.from_start else self.window) + 1 - self.seen)
        probs = outputs.new_zeros(len(words))
        for start in range(unused, len(words), _BLOCK):
            stop = min(start + _BLOCK, len(words))
            queries = slice(start, stop)
            # Rows of `keys`: this block's queries, and the history that any of them can see.
            first, last = len(keys) - len(words) + start, len(keys) - len(words) + stop
            rows = slice(max(0, first - self.window), last - 1)
            age = row[first:last].unsqueeze(1) - row[rows]
            attention = (self.theta * outputs[queries]) @ keys[rows].t()
            attention.masked_fill_((age < 1) | (age > self.window), -torch.inf)
            same_word = words[queries].unsqueeze(1) == history[rows]
            probs[queries] = attention.softmax(dim=1).masked_fill_(~same_word, 0).sum(dim=1)
        in_use = torch.arange(len(words), device=outputs.device) >= unused
        self.seen += len(words)
        # Copies, because views would keep a long chunk in memory.
        self._keys, self._words = keys[-self.window :].clone(), history[-self.window :].clone()
        return probs, in_use
