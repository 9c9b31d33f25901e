"""What prompt caching saves at a provider's prices, and which hit rate a saving takes."""

from dataclasses import dataclass

from bench.article.sources import CACHE_READ_PRICE, CACHE_WRITE_PRICE


@dataclass(frozen=True, slots=True)
class CachePrices:
    """Prices of a prompt token in units of the plain price: found in the cache, and computed (and kept)."""

    read: float = CACHE_READ_PRICE
    write: float = 1.0

    def share(self, hit_rate: float) -> float:
        """Return the bill for prompts with caching, as a share of the bill without."""
        return self.read * hit_rate + self.write * (1.0 - hit_rate)

    def saving(self, hit_rate: float) -> float:
        """Return the share of the bill that caching saves."""
        return 1.0 - self.share(hit_rate)

    def multiple(self, hit_rate: float) -> float:
        """Return how many times the bill would be without caching."""
        return 1.0 / self.share(hit_rate)

    def hit_rate_for(self, multiple: float) -> float:
        """Return the hit rate at which the bill without caching is so many times the bill with it."""
        return (self.write - 1.0 / multiple) / (self.write - self.read)


#: As the article reckons, and with what a provider charges for keeping what was computed.
PLAIN = CachePrices()
WITH_WRITES = CachePrices(write=CACHE_WRITE_PRICE)
