"""The mask prover's parts: what a mask's graph computes, as a formula over batch, head, query and key position.

Read them in this order:
    terms, formula      true/false formulas over integer expressions (sympy), in normal form
    absorption          what conjuncts (and disjuncts) say of each other
    cases               numbers that depend on a formula
    facts               what is known of sizes and positions: signs, ranges, sequences that never decrease
    tensor              abstract tensors: a shape, and one formula or number in terms of the index
    operations          the table: name of an operation -> what it does to abstract tensors; filled by
                        operations_arithmetic, _logic, _creation, _views, _indexing and _scans, with conversion
    writes, overwriting which nodes write tensors in place, and which value a reader therefore sees
    mapping             indices that are no dimensions, inside torch.vmap and predicates
    constants           reads a mask that is kept in a buffer by value
    interpreter         evaluates the nodes that make a mask, without running them
    additive            reads a mask that is added to the scores
    interval, words     reads the final formula as one interval per query, less padding, or says why it is none
    causes              names what is behind a refusal
    emission, positions writes the interval's ends and the padding vector back into a graph, with graph_builder
"""
