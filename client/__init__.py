"""The organisation's side: data, engine, guard and trainer, and the relay that speaks Flower."""
