"""MLflow: runs, the registered model, and the store that holds both. No other package imports `mlflow`."""
