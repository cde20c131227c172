"What a model costs and how well it does: counters, latency, quality, the report."
