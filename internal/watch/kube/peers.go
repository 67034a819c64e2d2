package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// PublishBGPSession writes a node's session into the status of a BGPPeer, by server-side apply as an owner of its
// own, so that nodes do not overwrite each other. Nil takes the node's entry away. A BGPPeer that is not there any
// more is not an error.
func (c *Client) PublishBGPSession(ctx context.Context, peer, node string, s *v1alpha1.BGPSession) error {
	sessions := []v1alpha1.BGPSession{}
	if s != nil {
		sessions = append(sessions, *s)
	}
	body, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": "BGPPeer", "metadata": map[string]any{"name": peer},
		"status": map[string]any{"sessions": sessions},
	})
	if err != nil {
		return err
	}
	err = c.fathom.Patch(types.ApplyYAMLPatchType).Resource("bgppeers").Name(peer).SubResource("status").
		Param("fieldManager", sessionOwner(node)).Param("force", "true").Body(body).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("publish the session with BGPPeer %s: %w", peer, err)
	}
	return nil
}

// sessionOwner is the field manager of a node's entry. Its length is limited to 128 bytes, that of a node's name to
// 253.
func sessionOwner(node string) string {
	const prefix = "fathom-agent/"
	if len(prefix+node) <= 128 {
		return prefix + node
	}
	sum := sha256.Sum256([]byte(node))
	return fmt.Sprintf("%s%s-%x", prefix, node[:80], sum[:8])
}
