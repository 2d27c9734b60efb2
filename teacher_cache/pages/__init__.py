"""Self-contained HTML pages of both stages: one style, charts as SVG, traces token by token."""
