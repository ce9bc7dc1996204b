"""Pages: templates and plots, made from results files alone; each opens without a network."""
