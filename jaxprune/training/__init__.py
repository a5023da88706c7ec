"""While a model trains: optax transformations that prune, and what goes around them.

`prune`, `splice` and `keep_params_sparse` land every update on exact zero; `penalties` let weights grow small first;
`inner` is what the optimizer inside them sees. `loops` go around whole trainings, `presets` name the published
compositions. What computes masks is below, in `methods`; nothing here traces a model or looks at its architecture.
"""
