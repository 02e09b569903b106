"""Choose a configuration, guard it and hand it on: recommend, gate, equivalence, deployment, export."""
