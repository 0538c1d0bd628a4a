"""What the server does, in figures for Prometheus: its own, and the engine's."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from peerlm.serve import protocol
from peerlm.serve.protocol import EngineProtocol

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class HttpMetrics:
    """Counts of requests by path and status, beside the engine's own figures."""

    def __init__(self, engine: EngineProtocol) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineFigures(engine))
        self.requests = Counter(
            "peerlm_http_requests", "Answers by path and status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "peerlm_http_seconds",
            "From a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)


class EngineFigures(Collector):
    """The engine's figures at the moment when they are asked for."""

    def __init__(self, engine: EngineProtocol) -> None:
        self.engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: figures are not asked for before the engine runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Each figure with its caption."""
        stats = self.engine.stats()
        for name, caption, value in (
            ("peerlm_requests_waiting", "Requests in the queue.", stats.waiting),
            ("peerlm_requests_running", "Requests in the batch.", stats.running),
            ("peerlm_slots", "Requests that the batch has room for.", stats.slots),
            ("peerlm_cache_bytes", "Bytes of the cache.", stats.cache_bytes),
            ("peerlm_cache_limit_bytes", "Most bytes of the cache.", stats.cache_bytes_limit),
            ("peerlm_tokens_per_second", "Tokens written per second, over 10 seconds.", stats.tokens_per_second),
        ):
            yield GaugeMetricFamily(name, caption, value=value)
        for name, caption, value in (
            ("peerlm_prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("peerlm_cached_tokens", "Tokens of prompts that were not read again.", stats.cached_tokens),
            ("peerlm_generated_tokens", "Tokens written.", stats.generated_tokens),
            ("peerlm_steps", "Forward passes that wrote tokens.", stats.steps),
        ):
            yield CounterMetricFamily(name, caption, value=value)
        finished = CounterMetricFamily("peerlm_finished", "Sequences that have ended, by reason.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield _histogram("peerlm_first_token_seconds", "From submission to the first token.", stats.first_token_seconds)
        yield _histogram("peerlm_token_seconds", "Between two tokens of a sequence.", stats.token_seconds)
        yield from self._layers(stats)
        using = GaugeMetricFamily("peerlm_pack_requests", "Requests that use a pack now.", labels=["pack", "kind"])
        for name, entry in self.engine.loaded().items():
            using.add_metric([name, entry.kind], entry.running)
        yield using

    @staticmethod
    def _layers(stats: protocol.Stats) -> Iterator[Metric]:
        for field, caption in (
            ("experts", "Experts of a layer."),
            ("share", "Share of a layer's experts that any token used."),
            ("unevenness", "How unevenly tokens use a layer's experts, in nats; 0 when all are used alike."),
        ):
            family = GaugeMetricFamily(f"peerlm_layer_{field}", caption, labels=["layer"])
            for path, use in stats.use.items():
                family.add_metric([path], getattr(use, field))
            yield family


def _histogram(name: str, caption: str, measured: protocol.Histogram) -> Metric:
    total, buckets = 0, []
    for bound, count in zip((*map(str, measured.bounds), "+Inf"), measured.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(name, caption, buckets=buckets, sum_value=measured.total)
