"""The mask prover's parts: what a mask's graph computes, as a formula over batch, head, query and key position.

Read them in this order:
    formula     true/false formulas over integer expressions (sympy), and numbers that depend on a formula
    tensor      abstract tensors: a shape, and one formula or number in terms of the index
    writes      which nodes write tensors in place, and which value a reader therefore sees
    operations  the table: name of an operation -> what it does to abstract tensors
    interpreter evaluates the nodes that make a mask, without running them
    facts       what is known of sizes and positions: signs, ranges, sequences that never decrease
    interval    reads the final formula as one interval per query, less padding, or says why it is none
    emission    writes the interval's ends and the padding vector back into a graph
    constants   reads a mask that is kept in a buffer by value
"""
