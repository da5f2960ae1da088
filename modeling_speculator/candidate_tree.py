"""The candidate tree: drafted sequences merged by common prefix, as tensors of fixed shape."""

from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F


@dataclass
class CandidateTree:
    """Drafted tokens as a tree. Node 0 is the root: the last accepted token.

    A parent comes before its children, and siblings differ in their token.
    Rows of the batch with fewer nodes than the widest are padded at the end with nodes of depth 0.

    Attributes:
        input_ids: (batch, nodes) token ids.
        parents: (batch, nodes), the node before; 0 at the root and at padding.
        depths: (batch, nodes), 0 at the root and at padding.
        ancestors: (batch, nodes, nodes) bool, True where the second is the first or an ancestor of it.
        n_nodes: (batch,), the root included and padding not.
        max_depth: the most drafted tokens on a path.
    """

    input_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    n_nodes: torch.Tensor
    max_depth: int

    @classmethod
    def root_only(cls, root: torch.Tensor) -> "CandidateTree":
        """The tree without a draft: root (batch, 1) -> one node."""
        return cls(
            input_ids=root,
            parents=torch.zeros_like(root),
            depths=torch.zeros_like(root),
            ancestors=torch.ones_like(root, dtype=torch.bool)[:, :, None],
            n_nodes=torch.ones_like(root[:, 0]),
            max_depth=0,
        )

    @classmethod
    def merge(cls, root: torch.Tensor, candidates: torch.Tensor, max_nodes: int) -> "CandidateTree":
        """Merges the candidates' common prefixes, without a loop and without waiting for the device.

        Args:
            root: (batch, 1), the last accepted token.
            candidates: (batch, n_candidates, depth).
            max_nodes: nodes of the result, padding included; 1 + n_candidates * depth is always enough.
        """
        batch, n_candidates, depth = candidates.shape
        device = root.device
        tokens = candidates.transpose(1, 2).contiguous()  # (batch, depth, n_candidates): all that follows is by level
        # A candidate's node at a level is owned by the first candidate that has the same tokens up to there.
        same_token = tokens[:, :, :, None] == tokens[:, :, None]  # (batch, depth, n_candidates, n_candidates)
        owner = same_token.cumprod(1).argmax(-1)  # (batch, depth, n_candidates)
        me = torch.arange(n_candidates, device=device)
        level = torch.arange(depth, device=device)[:, None]
        number = (owner == me).flatten(1).cumsum(1)  # nodes counted from 1: the root is 0
        node = number.gather(1, (owner + level * n_candidates).flatten(1))  # (batch, depth * n_candidates)
        paths = F.pad(node, (n_candidates, 0))  # with the root, one level more

        # Several candidates write the same node, with the same values.
        parent = paths[:, : depth * n_candidates]
        values = torch.stack([tokens.flatten(1), parent, (level + 1).expand_as(owner).flatten(1), owner.flatten(1)], 1)
        columns = root.new_zeros(batch, 4, max_nodes).scatter_(2, node[:, None].expand_as(values), values)
        input_ids, parents, depths, path_of = columns.unbind(1)
        input_ids[:, :1] = root
        on_path = torch.zeros(batch, n_candidates, max_nodes, dtype=torch.bool, device=device)
        on_path.scatter_(2, paths.view(batch, depth + 1, n_candidates).transpose(1, 2), True)
        # A node's ancestors are those on the path of a candidate through it that are no deeper.
        ancestors = on_path.gather(1, path_of[:, :, None].expand(-1, -1, max_nodes))
        ancestors &= depths[:, None] <= depths[:, :, None]
        ancestors |= torch.eye(max_nodes, dtype=torch.bool, device=device)  # padding sees itself
        return cls(input_ids, parents, depths, ancestors, number[:, -1] + 1, max_depth=depth)

    @classmethod
    def from_parents(
        cls, root: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, max_depth: int
    ) -> "CandidateTree":
        """A tree whose drafted nodes are given level by level: root (batch, 1), the others (batch, nodes - 1)."""
        parents, depths = F.pad(parents, (1, 0)), F.pad(depths, (1, 0))
        nodes = parents.shape[1]
        itself = torch.eye(nodes, dtype=torch.bool, device=root.device)
        ancestors = itself.expand(len(root), -1, -1)
        for _ in range(max_depth):  # a node's ancestors are itself and its parent's
            ancestors = itself | ancestors.gather(1, parents[:, :, None].expand(-1, -1, nodes))
        return cls(
            input_ids=torch.cat([root, tokens], dim=1),
            parents=parents,
            depths=depths,
            ancestors=ancestors,
            n_nodes=torch.full_like(root[:, 0], nodes),
            max_depth=max_depth,
        )

    def graft(self, branch: torch.Tensor, found: torch.Tensor) -> "CandidateTree":
        """The tree with one more branch from the root, merged with the nodes that it shares; the others come last.

        Args:
            branch: (batch, n), its tokens.
            found: (batch,) bool, the rows that get it.
        """
        n = branch.shape[1]
        node, shared, goes_on = torch.zeros_like(branch[:, 0]), torch.zeros_like(branch[:, 0]), found
        for depth in range(min(self.max_depth, n)):
            child, is_child = self.child(node, branch[:, depth])
            goes_on = goes_on & is_child
            node = torch.where(goes_on, child, node)
            shared = shared + goes_on

        nodes, along = self.input_ids.shape[1] + n, torch.arange(n, device=branch.device)
        is_new = (along >= shared[:, None]) & found[:, None]  # (batch, n)
        slot = self.n_nodes[:, None] + along - shared[:, None]
        parent = torch.where(along == shared[:, None], node[:, None], slot - 1)
        slot = torch.where(is_new, slot, nodes)  # the last column is thrown away

        def put(values: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return F.pad(values, (0, n + 1)).scatter(1, slot, new.expand_as(slot))[:, :nodes]

        depths = put(self.depths, along + 1)
        on_branch = put(torch.zeros_like(self.depths), torch.ones_like(along)).bool()  # and new
        # The ancestors of a new node: those of the last one that is shared, and the new ones above it.
        shared_ancestors = self.ancestors.gather(1, node[:, None, None].expand(-1, 1, self.ancestors.shape[2]))
        above = on_branch[:, None] & (depths[:, None] <= along[:, None] + 1)  # (batch, n, nodes)
        ancestors = F.pad(self.ancestors, (0, n, 0, n + 1))
        ancestors = ancestors.scatter(1, slot[:, :, None].expand_as(above), F.pad(shared_ancestors, (0, n)) | above)
        ancestors = ancestors[:, :nodes] | torch.eye(nodes, dtype=torch.bool, device=branch.device)
        return CandidateTree(
            input_ids=put(self.input_ids, branch),
            parents=put(self.parents, parent),
            depths=depths,
            ancestors=ancestors,
            n_nodes=self.n_nodes + is_new.sum(1),
            max_depth=max(self.max_depth, n),
        )

    def trim(self, n_nodes: int) -> "CandidateTree":
        """The tree without padding beyond the `n_nodes` nodes of its widest row."""
        if n_nodes == self.input_ids.shape[1]:
            return self
        return CandidateTree(
            input_ids=self.input_ids[:, :n_nodes],
            parents=self.parents[:, :n_nodes],
            depths=self.depths[:, :n_nodes],
            ancestors=self.ancestors[:, :n_nodes, :n_nodes],
            n_nodes=self.n_nodes,
            max_depth=self.max_depth,
        )

    def only(self, kept: torch.Tensor) -> "CandidateTree":
        """The tree of some nodes (batch, n) in ascending order: the root, and others with all their ancestors.

        What is kept of the padding must come last.
        """
        columns = kept[:, None].expand(-1, kept.shape[1], -1)
        ancestors = self.ancestors.gather(1, kept[:, :, None].expand(-1, -1, self.ancestors.shape[2]))
        number = torch.zeros_like(self.parents).scatter(
            1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        )
        depths = self.depths.gather(1, kept)
        return CandidateTree(
            input_ids=self.input_ids.gather(1, kept),
            parents=number.gather(1, self.parents.gather(1, kept)),
            depths=depths,
            ancestors=ancestors.gather(2, columns),
            n_nodes=1 + (depths > 0).sum(1),
            max_depth=self.max_depth,
        )

    def rows(self, rows: slice) -> "CandidateTree":
        """The trees of some rows of the batch."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return CandidateTree(**{k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def child(self, node: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which child of each row's node (batch,) carries a token (batch,), and whether there is one."""
        is_it = (self.parents == node[:, None]) & (self.input_ids == token[:, None]) & (self.depths > 0)
        return is_it.int().argmax(-1), is_it.any(-1)


def max_nodes(config) -> int:
    """The most nodes that the tree of a drafter with this config can have, the root included."""
    if config.n_candidates > 0 and getattr(config, "n_tree_nodes", None) is not None:
        return 1 + config.n_tree_nodes
    top_k = getattr(config, "top_k_tokens_per_head", None)
    nodes, leaves = 1, 1
    for head in range(getattr(config, "n_heads", None) or config.n_predict):
        leaves = leaves * top_k[head] if top_k else config.n_candidates
        nodes += min(config.n_candidates, leaves)
    return nodes
