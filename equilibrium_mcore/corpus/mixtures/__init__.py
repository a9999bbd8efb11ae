"""From a mixture's datasets to indexed data and a blend."""
