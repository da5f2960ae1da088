"""The candidate tree: drafted sequences merged by common prefix, as tensors of fixed shape."""

from dataclasses import dataclass

import torch


@dataclass
class CandidateTree:
    """Drafted candidates and the tree that they share. Node 0 is the root: the last accepted token.

    Nodes are numbered level by level, so that a parent comes before its children. Rows of the batch with fewer
    nodes than the widest are padded at the end; no path leads through padding.

    Attributes:
        candidates: (batch, n_candidates, depth) token ids.
        paths: (batch, n_candidates, depth + 1), the nodes on each candidate's path, the root first.
        input_ids: (batch, nodes) token ids.
        depths: (batch, nodes), 0 at the root.
        ancestors: (batch, nodes, nodes) bool, True where the second is the first or an ancestor of it.
        n_nodes: (batch,), the root included and padding not.
    """

    candidates: torch.Tensor
    paths: torch.Tensor
    input_ids: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    n_nodes: torch.Tensor

    @classmethod
    def root_only(cls, root: torch.Tensor) -> "CandidateTree":
        """The tree without a draft, of one empty candidate: root (batch, 1) -> one node."""
        return cls(
            candidates=root[:, :, None][..., :0],
            paths=torch.zeros_like(root)[:, :, None],
            input_ids=root,
            depths=torch.zeros_like(root),
            ancestors=torch.ones_like(root, dtype=torch.bool)[:, :, None],
            n_nodes=torch.ones_like(root[:, 0]),
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
        # A candidate's node at a level is owned by the first candidate that has the same tokens up to there.
        same_token = candidates[:, :, None] == candidates[:, None]  # (batch, n_candidates, n_candidates, depth)
        owner = same_token.cumprod(-1).argmax(2)  # (batch, n_candidates, depth)
        owner = owner.transpose(1, 2).flatten(1)  # (batch, depth * n_candidates), level by level
        me = torch.arange(n_candidates, device=root.device).repeat(depth)
        number = (owner == me).cumsum(1)  # nodes counted from 1: the root is 0
        level = torch.arange(depth, device=root.device).repeat_interleave(n_candidates)
        node = number.gather(1, owner + level * n_candidates)  # (batch, depth * n_candidates)

        # Several candidates write the same node, with the same values.
        zeros = root.new_zeros(batch, max_nodes)
        input_ids = zeros.scatter(1, node, candidates.transpose(1, 2).flatten(1))
        input_ids[:, :1] = root
        depths = zeros.scatter(1, node, (level + 1).expand(batch, -1))
        paths = torch.nn.functional.pad(node.view(batch, depth, n_candidates).transpose(1, 2), (1, 0))
        on_path = torch.zeros(batch, n_candidates, max_nodes, dtype=torch.bool, device=root.device)
        on_path.scatter_(2, paths, True)
        path_of = zeros.scatter(1, node, owner)  # (batch, max_nodes), a candidate that passes through the node
        ancestors = on_path.gather(1, path_of[:, :, None].expand(-1, -1, max_nodes))
        ancestors = ancestors & (depths[:, None] <= depths[:, :, None])
        ancestors = ancestors | torch.eye(max_nodes, dtype=torch.bool, device=root.device)  # padding sees itself
        return cls(candidates, paths, input_ids, depths, ancestors, number[:, -1] + 1)

    def trim(self, n_nodes: int) -> "CandidateTree":
        """The tree without padding beyond the `n_nodes` nodes of its widest row."""
        return CandidateTree(
            candidates=self.candidates,
            paths=self.paths,
            input_ids=self.input_ids[:, :n_nodes],
            depths=self.depths[:, :n_nodes],
            ancestors=self.ancestors[:, :n_nodes, :n_nodes],
            n_nodes=self.n_nodes,
        )
