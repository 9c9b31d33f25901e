"""What steps and transfers cost: measured profiles, and rooflines over chips and model shapes."""
