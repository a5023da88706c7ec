"""Where sparsity pays: dense against sparse, measured on this machine, with what else can be compared.

    row = one contestant (a format, dense, a rival) in one case (weights, sparsity, batch)

`layers` and `whole` make the cases, `contest` measures one, `rows` says what the numbers come to, `session` and
`figures` show them. `jaxprune bench` is the way in.
"""
