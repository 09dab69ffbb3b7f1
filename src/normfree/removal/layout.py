"""The folder of a removal: names of its files and folders, and of the models that its table compares."""

TABLE_FILE = "removal.csv"
NORM_FREE_FOLDER = "norm-free"
STOCK_FOLDER = "stock"
REMOVAL_FOLDER = "removal"
SCHEDULE_FILE = "schedule.yaml"
COSTS_FILE = "norm-costs.csv"
ORIGINAL, VANILLA, NORM_FREE = "original", "vanilla", "norm-free"
