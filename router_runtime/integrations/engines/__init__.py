"""What the plug-ins of engines share: the Router of a layer, the log, weights that change."""
