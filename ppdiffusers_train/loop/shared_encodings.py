"""Parts of an encoded sample that several jobs encode alike, such as the image embedding of Kandinsky's two models.

A module names the methods in `shared`. While a cache is filled, what such a method gives is kept with the sample, with
a hash of what it took. The cache of another job has the sample under the same key, so it finds the result there, and
takes it if the method, its models, and what it took are the same.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import paddle

from ppdiffusers_train.data.encoders_key import read_about
from ppdiffusers_train.data.packs import HIDDEN, Packs


class SharedEncodings:
    """Keeps and finds the results of a module's shared methods.

    Args:
        digests: {method: a hash of all that its result depends on besides what it takes}.
        folder: of the module's encoders in the cache; the others are beside it.
    """

    def __init__(self, module, digests: dict, folder: Path, log):
        self.module, self.digests, self.key, self.kept, self.others = module, digests, None, {}, {}
        for other in sorted(folder.parent.iterdir()) if digests else ():
            known = read_about(other).get("shared", {}) if other != folder else {}
            for method in (method for method in digests if known.get(method) == digests[method]):
                log(f"{other}: another job has encoded parts of samples in the same way; they are not encoded again")
                self.others.setdefault(method, []).append(Packs(other, log))
        self.methods = {method: getattr(module, method) for method in digests}

    def __enter__(self):
        for method in self.methods:
            setattr(self.module, method, lambda value, method=method: self._encode(method, value))
        return self

    def __exit__(self, *_):
        for method in self.methods:
            delattr(self.module, method)

    @contextlib.contextmanager
    def sample(self, key: bytes):
        """A context for encoding the sample with this key; gives the arrays that are to be kept with it."""
        self.key, self.kept = key, {}
        yield self.kept

    def _encode(self, method: str, value):
        taken = np.frombuffer(hashlib.blake2b(np.ascontiguousarray(value.numpy()), digest_size=16).digest(), np.uint8)
        known = next(filter(None, (self._find(packs, method, taken) for packs in self.others.get(method, ()))), None)
        result = self.methods[method](value) if known is None else paddle.to_tensor(known[0][None])
        self.kept |= {f"{HIDDEN}{method}": result[0].numpy(), f"{HIDDEN}{method} of": taken}
        return result

    def _find(self, packs: Packs, method: str, taken: np.ndarray):
        """(what another job has encoded,), or None."""
        try:
            known = packs.read(self.key)
        except (KeyError, OSError):
            return None
        is_same = np.array_equal(known.get(f"{HIDDEN}{method} of"), taken)
        return (known[f"{HIDDEN}{method}"],) if is_same else None
