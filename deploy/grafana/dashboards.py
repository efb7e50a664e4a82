# SPDX-License-Identifier: Apache-2.0
"""The dashboards: what an operator asks, and the queries that answer.

Overview: is the service healthy, is pruning on, what does it bring? Savings: how much, and at what
cost? Engine: vLLM's own metrics. Gateway: who asks, who is refused, what does the gateway itself
take?
"""

from __future__ import annotations

from dataclasses import replace

from .panels import (
    TARGETS,
    Dashboard,
    Panel,
    Query,
    Row,
    plugin,
    pruned_and_not,
    quantile,
    quantiles,
    rate,
    ratio,
    value,
)

_PRUNED_SHARE = ratio(
    plugin("himap_requests_total", 'outcome="pruned"'), plugin("himap_requests_total")
)
_ERRORS = rate("himap_http_requests_total", 'status=~"5.."')
_HELD = plugin("himap_kv_blocks_total")
_SAVED = plugin("himap_kv_blocks_saved_total")
_BLOCKS_SAVED = ratio(_SAVED, f"({_SAVED} + {_HELD})")
_FLOPS_AVOIDED = "1 - " + ratio(
    rate("himap_prefill_flops_total"), rate("himap_prefill_flops_unpruned_total")
)


def _kept(stage: int, by: tuple[str, ...] = ()) -> str:
    return ratio(
        plugin("himap_image_tokens_total", f'stage="{stage}"', by),
        plugin("himap_image_tokens_total", 'stage="0"', by),
    )


def _blocks(by: tuple[str, ...]) -> tuple[str, str]:
    """KV blocks that pruned prompts held, and would have held."""
    held, saved = (plugin(f"himap_kv_blocks{end}_total", by=by) for end in ("", "_saved"))
    return held, f"({saved} + {held})"


_PRUNED_STAT = Panel(
    "Prompts pruned",
    "Share of the prompts with images that were pruned. 0 %: pruning is off, or clients turn it "
    "off; bypassed prompts are on the savings dashboard.",
    (Query(_PRUNED_SHARE),),
    "percentunit",
    "stat",
    3,
)
_BLOCKS_STAT = Panel(
    "KV blocks saved",
    "Share of the KV cache blocks that pruned prompts would have held without pruning, and did "
    "not. Counted from the block tables.",
    (Query(_BLOCKS_SAVED),),
    "percentunit",
    "stat",
    3,
)
_FLOPS_STAT = Panel(
    "Prefill FLOPs avoided",
    "Of the decoder's prefill, over all prompts with images, pruned or not. The vision tower is "
    "not in it.",
    (Query(_FLOPS_AVOIDED),),
    "percentunit",
    "stat",
    3,
)
_FIT_STAT = Panel(
    "Requests that fit",
    "How many pruned prompts fit where one unpruned prompt did, by their KV blocks.",
    (Query(ratio(f"({_SAVED} + {_HELD})", _HELD)),),
    "suffix: x",
    "stat",
    3,
)
_WAITING = Panel(
    "Running and waiting",
    "Requests in the engine. Waiting that grows means too little capacity.",
    (
        Query(f"sum({value('vllm:num_requests_running')})", "running"),
        Query(f"sum({value('vllm:num_requests_waiting')})", "waiting"),
    ),
)
_KV_USE = Panel(
    "KV cache used",
    "Of each engine. Close to 100 %, requests wait or are preempted.",
    (
        Query(
            f"max by (instance, engine) ({value('vllm:kv_cache_usage_perc')})",
            "{{instance}} engine {{engine}}",
        ),
    ),
    "percentunit",
)
_REFUSED = Panel(
    "Not answered, by reason",
    "Requests refused or failed. `key`: no valid API key; `rate`, `concurrency`: the key's limits; "
    "`image_*`: the picture; `loading`, `draining`, `failed`: the service; `engine_busy`: vLLM's "
    "queue limits; `timeout`; `client_went_away`.",
    (Query(rate("himap_refused_requests_total", by=["reason"]), "{{reason}}"),),
    "reqps",
    stacked=True,
)
_BY_OUTCOME = Panel(
    "Prompts with images, by outcome",
    "`pruned`; `unpruned`: asked for or defaulted to ratio 0; `bypassed_*`: the server's default "
    "asked for pruning and it could not be done, for the reason named.",
    (Query(plugin("himap_requests_total", by=["outcome"]), "{{outcome}}"),),
    "reqps",
    stacked=True,
)

OVERVIEW = Dashboard(
    "himap-overview",
    "HiMAP overview",
    "**Healthy?** No alert, nothing unreachable, no 5xx, nothing waiting. "
    "**Is pruning on?** *Prompts pruned* above 0 %. "
    "**What does it save?** *KV blocks saved* and *Prefill FLOPs avoided*; details on *HiMAP "
    "savings*. **What does it bring?** Time to first token of pruned against unpruned requests, "
    "all with images. "
    "**Not healthy?** Each alert has its section in the repository's `docs/runbooks.md`.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Requests",
                    "To /v1, answered or not.",
                    (Query(rate("himap_http_requests_total")),),
                    "reqps",
                    "stat",
                    3,
                ),
                Panel(
                    "5xx",
                    "Share of the requests that failed by the service's fault.",
                    (
                        Query(
                            f"({_ERRORS} or vector(0)) / ({rate('himap_http_requests_total')} > 0)"
                        ),
                    ),
                    "percentunit",
                    "stat",
                    3,
                    (0.01, 0.05),
                ),
                Panel(
                    "First token, p95",
                    "From a request's arrival at the gateway.",
                    pruned_and_not("himap_time_to_first_token_seconds", [0.95]),
                    "s",
                    "stat",
                    6,
                    (2.5, 5),
                ),
                Panel(
                    "Waiting",
                    "Requests that wait for the engine.",
                    (Query(f"sum({value('vllm:num_requests_waiting')})"),),
                    "short",
                    "stat",
                    3,
                    (5, 20),
                ),
                Panel(
                    "KV cache used",
                    "Of the fullest engine.",
                    (Query(f"max({value('vllm:kv_cache_usage_perc')})"),),
                    "percentunit",
                    "stat",
                    3,
                    (0.8, 0.9),
                ),
                Panel(
                    "Unreachable",
                    "Gateways that don't answer Prometheus.",
                    (Query('count(up{job=~"$job"} == 0) or vector(0)'),),
                    "short",
                    "stat",
                    3,
                    (1, 1),
                ),
                Panel(
                    "Alerts",
                    "Firing now; the table below names them.",
                    (
                        Query(
                            'count(ALERTS{alertname=~"Himap.+", alertstate="firing"}) or vector(0)'
                        ),
                    ),
                    "short",
                    "stat",
                    3,
                    (1, 2),
                ),
                *(replace(panel, width=6) for panel in (_PRUNED_STAT, _BLOCKS_STAT, _FLOPS_STAT)),
                replace(_FIT_STAT, width=6),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests by status",
                    "499: the client went away.",
                    (Query(rate("himap_http_requests_total", by=["status"]), "{{status}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens as the client sent them, image tokens included; generated ones.",
                    (
                        Query(rate("vllm:prompt_tokens_total"), "prompt"),
                        Query(rate("vllm:generation_tokens_total"), "generated"),
                    ),
                    "short",
                ),
                _REFUSED,
            ),
        ),
        Row(
            "Latency, pruned and not",
            (
                Panel(
                    "Time to first token",
                    "From a request's arrival at the gateway. What pruning shortens.",
                    pruned_and_not("himap_time_to_first_token_seconds"),
                    "s",
                ),
                Panel(
                    "Time per output token",
                    "Mean of a request's tokens after the first. Pruning shortens it only by the "
                    "smaller KV cache that is read.",
                    pruned_and_not("himap_time_per_output_token_seconds"),
                    "s",
                ),
                Panel(
                    "Whole answer",
                    "From a request's arrival to the end of its answer; grows with its length.",
                    pruned_and_not("himap_e2e_request_latency_seconds"),
                    "s",
                ),
            ),
        ),
        Row(
            "Saturation",
            (
                _WAITING,
                _KV_USE,
                Panel(
                    "Preemptions",
                    "Requests thrown out of the KV cache, to be computed again.",
                    (Query(rate("vllm:num_preemptions_total", by=["instance"]), "{{instance}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Alerts",
            (
                Panel(
                    "Firing",
                    "What to do: docs/runbooks.md, the section of the alert's name.",
                    (
                        Query(
                            "sum by (alertname, severity, instance, model_name) "
                            '(ALERTS{alertname=~"Himap.+", alertstate="firing"})'
                        ),
                    ),
                    kind="table",
                    width=24,
                    idle_only="a healthy service has no firing alert",
                ),
            ),
        ),
    ),
)

SAVINGS = Dashboard(
    "himap-savings",
    "HiMAP savings",
    "What pruning drops, saves and costs. Image tokens and KV blocks are those of **pruned** "
    "prompts, counted in the engine from the block tables; KV entries and FLOPs are of **all** "
    "prompts with images. Requests choose their own ratios: the *share kept* is what they come to. "
    "Nothing saved though prompts are pruned: see `HimapPruningSavesNothing` in the repository's "
    "`docs/runbooks.md`.",
    (
        Row(
            "Now",
            (
                _PRUNED_STAT,
                Panel(
                    "Image tokens kept",
                    "Of pruned prompts, after the second cut.",
                    (Query(_kept(2)),),
                    "percentunit",
                    "stat",
                    3,
                ),
                _BLOCKS_STAT,
                _FLOPS_STAT,
                _FIT_STAT,
                Panel(
                    "KV memory saved",
                    "Bytes not allocated to prompts, summed over the dashboard's time range. "
                    "Blocks are reused, so this is turnover, not free memory.",
                    (Query(plugin("himap_kv_saved_bytes_total", function="increase")),),
                    "bytes",
                    "stat",
                    3,
                ),
                Panel(
                    "Cost per pruning step",
                    "Host time of scoring and selection, mean over engine steps that pruned. On a "
                    "GPU this is the time to launch them.",
                    (
                        Query(
                            ratio(
                                plugin("himap_pruning_seconds_total"),
                                plugin("himap_pruning_steps_total"),
                            )
                        ),
                    ),
                    "s",
                    "stat",
                    3,
                ),
                Panel(
                    "Share of time spent",
                    "Pruning's host time per second of wall time, over all instances.",
                    (Query(plugin("himap_pruning_seconds_total")),),
                    "percentunit",
                    "stat",
                    3,
                ),
            ),
        ),
        Row(
            "Image tokens",
            (
                _BY_OUTCOME,
                Panel(
                    "Image tokens by stage",
                    "Of pruned prompts: sent, left after the first cut, left after the second.",
                    tuple(
                        Query(plugin("himap_image_tokens_total", f'stage="{stage}"'), name)
                        for stage, name in (
                            (0, "sent"),
                            (1, "after first cut"),
                            (2, "after second cut"),
                        )
                    ),
                ),
                Panel(
                    "Share kept, prompt by prompt",
                    "After the second cut, of all prompts with images: 100 % are those that were "
                    "not pruned. A wide spread: clients choose ratios of their own.",
                    tuple(
                        Query(
                            quantile(q, "himap_prompt_kept_share", 'stage="2"'),
                            f"p{round(100 * q)}",
                        )
                        for q in (0.1, 0.5, 0.9)
                    ),
                    "percentunit",
                ),
                Panel(
                    "Share kept",
                    "Of pruned prompts' image tokens: the ratios that were really used. Defaults "
                    "0.5 and 0.75 leave 50 % and 12.5 %.",
                    (
                        Query(_kept(1), "after first cut"),
                        Query(_kept(2), "after second cut"),
                    ),
                    "percentunit",
                ),
            ),
        ),
        Row(
            "KV cache and compute",
            (
                Panel(
                    "KV blocks of pruned prompts",
                    "Allocated, and not allocated thanks to pruning, per second.",
                    (Query(_HELD, "held"), Query(_SAVED, "saved")),
                    stacked=True,
                ),
                Panel(
                    "KV entries of prompts with images",
                    "Token-layers of all prompts with images per second: as they are, and as they "
                    "would be without pruning.",
                    (
                        Query(rate("himap_prompt_kv_tokens_total"), "as is"),
                        Query(rate("himap_prompt_kv_tokens_unpruned_total"), "without pruning"),
                    ),
                ),
                Panel(
                    "Prefill FLOPs",
                    "Of the decoder, for prompts with images, per second: done, and without "
                    "pruning.",
                    (
                        Query(rate("himap_prefill_flops_total"), "done"),
                        Query(rate("himap_prefill_flops_unpruned_total"), "without pruning"),
                    ),
                    "flops",
                ),
            ),
        ),
        Row(
            "What it brings, what it costs",
            (
                Panel(
                    "Time to first token, p50 and p95",
                    "Pruned against not pruned, all with images.",
                    pruned_and_not("himap_time_to_first_token_seconds", [0.5, 0.95]),
                    "s",
                ),
                Panel(
                    "Scoring and selection",
                    "Host time per engine step that pruned.",
                    (
                        Query(
                            ratio(
                                plugin("himap_pruning_seconds_total", by=["instance"]),
                                plugin("himap_pruning_steps_total", by=["instance"]),
                            ),
                            "{{instance}}",
                        ),
                    ),
                    "s",
                ),
                Panel(
                    "Pruned prompts computed again",
                    "After a preemption; with the same result.",
                    (Query(plugin("himap_recomputed_total", by=["instance"]), "{{instance}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "By model",
            (
                Panel(
                    "Settings",
                    "The layers of the cuts, and the ratios of requests that don't choose.",
                    (
                        Query(
                            "max by (instance, model_name, shallow_layer, deep_layer, "
                            f"shallow_ratio, deep_ratio) ({value('himap_info')})"
                        ),
                    ),
                    kind="table",
                    width=24,
                ),
                Panel(
                    "Prompts pruned",
                    "Share of the prompts with images.",
                    (
                        Query(
                            ratio(
                                plugin(
                                    "himap_requests_total", 'outcome="pruned"', by=["model_name"]
                                ),
                                plugin("himap_requests_total", by=["model_name"]),
                            ),
                            "{{model_name}}",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Image tokens kept",
                    "Of pruned prompts, after the second cut.",
                    (Query(_kept(2, ("model_name",)), "{{model_name}}"),),
                    "percentunit",
                ),
                Panel(
                    "Requests that fit",
                    "How many pruned prompts fit where one unpruned prompt did, by their KV "
                    "blocks.",
                    (Query(ratio(*reversed(_blocks(("model_name",)))), "{{model_name}}"),),
                    "suffix: x",
                ),
                Panel(
                    "KV memory saved per second",
                    "Bytes not allocated to prompts.",
                    (
                        Query(
                            plugin("himap_kv_saved_bytes_total", by=["model_name"]),
                            "{{model_name}}",
                        ),
                    ),
                    "Bps",
                ),
                Panel(
                    "Prefill FLOPs avoided",
                    "Over all prompts with images.",
                    (
                        Query(
                            "1 - "
                            + ratio(
                                rate("himap_prefill_flops_total", by=["model_name"]),
                                rate("himap_prefill_flops_unpruned_total", by=["model_name"]),
                            ),
                            "{{model_name}}",
                        ),
                    ),
                    "percentunit",
                ),
            ),
        ),
    ),
)

ENGINE = Dashboard(
    "himap-engine",
    "HiMAP engine (vLLM)",
    "vLLM's own metrics, of the engine behind the gateway. Token counts are logical: what the "
    "client sent, before pruning. KV cache use is physical: pruning lowers it.",
    (
        Row(
            "Load",
            (
                _WAITING,
                Panel(
                    "Waiting, by reason",
                    "`capacity`: no room in the batch or the KV cache.",
                    (
                        Query(
                            f"sum by (reason) ({value('vllm:num_requests_waiting_by_reason')})",
                            "{{reason}}",
                        ),
                    ),
                ),
                _KV_USE,
                Panel(
                    "Finished, by reason",
                    "`length` is `max_tokens` or the context reached; `abort` a client gone.",
                    (
                        Query(
                            rate("vllm:request_success_total", by=["finished_reason"]),
                            "{{finished_reason}}",
                        ),
                    ),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Refused by the engine's queue limits",
                    "--max-num-queued-reqs and --max-num-queued-tokens.",
                    (Query(rate("vllm:admission_rejections_total", by=["reason"]), "{{reason}}"),),
                    "reqps",
                ),
                Panel(
                    "Preemptions",
                    "Requests thrown out of the KV cache, to be computed again.",
                    (Query(rate("vllm:num_preemptions_total", by=["engine"]), "{{engine}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Throughput",
            (
                Panel(
                    "Prompt tokens, by source",
                    "Computed here, or found in a cache.",
                    (
                        Query(
                            rate("vllm:prompt_tokens_by_source_total", by=["source"]), "{{source}}"
                        ),
                    ),
                    stacked=True,
                ),
                Panel(
                    "Generated tokens",
                    "Per second, all engines.",
                    (Query(rate("vllm:generation_tokens_total"), "generated"),),
                ),
                Panel(
                    "Tokens per engine step",
                    "Prefill and decode together; the most is --max-num-batched-tokens.",
                    quantiles("vllm:iteration_tokens_total"),
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "As the engine sees it; the gateway's own adds reading and checking images.",
                    quantiles("vllm:time_to_first_token_seconds"),
                    "s",
                ),
                Panel(
                    "Between tokens",
                    "Of all requests.",
                    quantiles("vllm:inter_token_latency_seconds"),
                    "s",
                ),
                Panel(
                    "Whole request",
                    "In the engine.",
                    quantiles("vllm:e2e_request_latency_seconds"),
                    "s",
                ),
                Panel(
                    "Where the time goes, p95",
                    "Waiting, prefill, decode.",
                    tuple(
                        Query(quantile(0.95, f"vllm:request_{part}_time_seconds"), part)
                        for part in ("queue", "prefill", "decode")
                    ),
                    "s",
                ),
                Panel(
                    "Time per output token",
                    "Mean of each request.",
                    quantiles("vllm:request_time_per_output_token_seconds"),
                    "s",
                ),
                Panel(
                    "Prompt tokens computed",
                    "Per request, cached ones left out; logical, before pruning.",
                    quantiles("vllm:request_prefill_kv_computed_tokens"),
                ),
            ),
        ),
        Row(
            "Caches and shape of the work",
            (
                Panel(
                    "Prefix cache hits",
                    "Share of the tokens asked for. From its first image on, a pruned prompt "
                    "neither reads nor fills this cache.",
                    (
                        Query(
                            ratio(
                                rate("vllm:prefix_cache_hits_total"),
                                rate("vllm:prefix_cache_queries_total"),
                            ),
                            "hits",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Image cache hits",
                    "Share of the images that had been processed before.",
                    (
                        Query(
                            ratio(
                                rate("vllm:mm_cache_hits_total"),
                                rate("vllm:mm_cache_queries_total"),
                            ),
                            "hits",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Prompt length",
                    "Tokens per request, image tokens included.",
                    quantiles("vllm:request_prompt_tokens"),
                ),
                Panel(
                    "Answer length",
                    "Tokens per request.",
                    quantiles("vllm:request_generation_tokens"),
                ),
                Panel(
                    "Requests that fit at today's mix",
                    "Running requests over the share of the KV cache that they fill: how many such "
                    "requests would fill it. Rough when few run.",
                    (
                        Query(
                            "sum(avg_over_time("
                            f"{value('vllm:num_requests_running')}[$__rate_interval])) / "
                            "(sum(avg_over_time("
                            f"{value('vllm:kv_cache_usage_perc')}[$__rate_interval])) > 0)",
                            "requests",
                        ),
                    ),
                ),
                Panel(
                    "KV cache settings",
                    "Blocks, block size and the rest, as labels.",
                    (
                        Query(
                            "max by (instance, engine, num_gpu_blocks, block_size, cache_dtype, "
                            f"enable_prefix_caching) (vllm:cache_config_info{{{TARGETS}}})"
                        ),
                    ),
                    kind="table",
                ),
            ),
        ),
    ),
)

GATEWAY = Dashboard(
    "himap-gateway",
    "HiMAP gateway",
    "Who asks, who is refused and why, what images cost, and what the gateway itself adds before "
    "vLLM's handler begins. Limits are per API key **and per replica**.",
    (
        Row(
            "Now",
            (
                Panel(
                    "In flight",
                    "Requests being worked on.",
                    (Query(f"sum({value('himap_requests_in_flight')})"),),
                    "short",
                    "stat",
                    4,
                ),
                Panel(
                    "Without a valid key",
                    "Requests answered 401. 0 where the gateway runs without keys.",
                    (
                        Query(
                            rate("himap_refused_requests_total", 'reason="key"') + " or vector(0)"
                        ),
                    ),
                    "reqps",
                    "stat",
                    4,
                ),
                Panel(
                    "Over a key's limits",
                    "Requests answered 429.",
                    (
                        Query(
                            rate("himap_refused_requests_total", 'reason=~"rate|concurrency"')
                            + " or vector(0)"
                        ),
                    ),
                    "reqps",
                    "stat",
                    4,
                ),
                Panel(
                    "Overhead, p95",
                    "From a request's last byte to vLLM's handler, fetching images apart.",
                    (Query(quantile(0.95, "himap_gateway_overhead_seconds")),),
                    "s",
                    "stat",
                    4,
                    (0.1, 1),
                ),
                Panel(
                    "Image fetch, p95",
                    "All images of a request.",
                    (Query(quantile(0.95, "himap_image_fetch_seconds")),),
                    "s",
                    "stat",
                    4,
                    (2.5, 10),
                ),
                Panel(
                    "Failed readings of the key file",
                    "Since the process started. Above 0, look at the log.",
                    (Query(f"sum(himap_api_key_file_errors_total{{{TARGETS}}})"),),
                    "short",
                    "stat",
                    4,
                    (1, 2),
                ),
            ),
        ),
        Row(
            "Who asks, who is refused",
            (
                Panel(
                    "Requests by route",
                    "`unknown`: refused before a route was looked for, or there is none.",
                    (Query(rate("himap_http_requests_total", by=["route"]), "{{route}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Requests by key",
                    "By the key's name; without one, the gateway is open or the key was refused.",
                    (Query(rate("himap_http_requests_total", by=["key"]), "key {{key}}"),),
                    "reqps",
                    stacked=True,
                ),
                _REFUSED,
            ),
        ),
        Row(
            "Images",
            (
                Panel(
                    "Images",
                    "That reached the engine.",
                    (Query(rate("himap_images_total"), "images"),),
                    "ops",
                ),
                Panel(
                    "Time to fetch",
                    "A request's images, from their hosts. Data URLs need none.",
                    quantiles("himap_image_fetch_seconds"),
                    "s",
                ),
                Panel(
                    "Refused images",
                    "By reason. `image_host`: not a public address and not allowed by "
                    "--image-hosts.",
                    (
                        Query(
                            rate(
                                "himap_refused_requests_total",
                                'reason=~"image.*|media|placeholder"',
                                ["reason"],
                            ),
                            "{{reason}}",
                        ),
                    ),
                    "reqps",
                    stacked=True,
                ),
            ),
        ),
        Row(
            "What the gateway adds",
            (
                Panel(
                    "Overhead",
                    "From a request's last byte to vLLM's handler, fetching images apart.",
                    pruned_and_not("himap_gateway_overhead_seconds", [0.5, 0.95]),
                    "s",
                ),
                Panel(
                    "Overhead, share of the answer's time",
                    "Sum of the one over sum of the other.",
                    (
                        Query(
                            ratio(
                                rate("himap_gateway_overhead_seconds_sum"),
                                rate("himap_e2e_request_latency_seconds_sum"),
                            ),
                            "overhead",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Waiting for the engine's scheduler",
                    "The engine's part of the wait, by request.",
                    pruned_and_not("himap_request_queue_time_seconds", [0.5, 0.95]),
                    "s",
                ),
            ),
        ),
        Row(
            "Process",
            (
                Panel(
                    "Memory",
                    "Of the gateway's process; engine and workers are processes of their own.",
                    (Query(f"process_resident_memory_bytes{{{TARGETS}}}", "{{instance}}"),),
                    "bytes",
                ),
                Panel(
                    "CPU",
                    "Cores used by the gateway's process.",
                    (
                        Query(
                            f"rate(process_cpu_seconds_total{{{TARGETS}}}[$__rate_interval])",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Up since",
                    "A restart shows as a fall.",
                    (Query(f"time() - process_start_time_seconds{{{TARGETS}}}", "{{instance}}"),),
                    "s",
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, SAVINGS, ENGINE, GATEWAY)
