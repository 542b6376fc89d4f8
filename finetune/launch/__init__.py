"""The launch file and the environment as a Strategy; ranks are started here."""
