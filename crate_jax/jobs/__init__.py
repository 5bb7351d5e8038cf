"""The jobs of the command line, one file each: config and folder in, record out. No other room imports a job."""
