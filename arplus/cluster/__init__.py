"""The Ray cluster: joining it, asking its nodes, what it has room for."""
