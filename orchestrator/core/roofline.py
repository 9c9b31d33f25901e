"""From chips and a model's shape to what a step costs: one formula for each phase, compiled into a `CostProfile`."""
