"""The sanity ladder: cheap checks of one run's config, data and model, on one rank."""
