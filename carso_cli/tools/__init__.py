"""The commands around a trained run: predict, extract, export, import, quickstart, doctor."""
