"""A cluster's processes on Ray: started, watched, replaced. The only folder of the orchestrator that imports Ray."""
