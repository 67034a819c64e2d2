package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

const bgpPeers = "bgppeers"

// peerView is the part of a View that shows BGPPeers. A cluster may do without their CRD: then it is never synced,
// and asks again from time to time.
type peerView struct {
	peers  cache.Indexer
	synced cache.InformerSynced
}

// BGPPeers returns the cluster's BGPPeers, in no order. Known says whether the API server has told of them: it has
// not where their CRD is not installed.
func (v *View) BGPPeers() (peers []*v1alpha1.BGPPeer, known bool) {
	if v.bgp.synced == nil || !v.bgp.synced() {
		return nil, false
	}
	return all[*v1alpha1.BGPPeer](v.bgp.peers), true
}

// watchPeers begins to watch them.
func (v *View) watchPeers(ctx context.Context, c *Client, o ViewOptions) error {
	source := cache.NewListWatchFromClient(c.fathom, bgpPeers, "", fields.Everything())
	informer := cache.NewSharedIndexInformer(source, &v1alpha1.BGPPeer{}, 0, cache.Indexers{})
	if err := informer.SetTransform(func(a any) (any, error) { return shrinkPeer(a, o.Node), nil }); err != nil {
		return err
	}
	// That there is no such kind is no problem; what else may fail, those who want BGP see in the events that are
	// not there, and in what client-go's handler would have said, which is an error each time.
	if err := informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		if !apierrors.IsNotFound(err) {
			cache.DefaultWatchErrorHandler(ctx, r, err)
		}
	}); err != nil {
		return err
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { o.Changed() },
		UpdateFunc: func(a, b any) {
			// Each node writes into the object's status: what others write is not for this node to act on.
			was, is := a.(*v1alpha1.BGPPeer), b.(*v1alpha1.BGPPeer)
			if was.Generation != is.Generation || !reflect.DeepEqual(BGPSessionOf(was, o.Node), BGPSessionOf(is, o.Node)) {
				o.Changed()
			}
		},
		DeleteFunc: func(any) { o.Changed() },
	}); err != nil {
		return err
	}
	v.bgp = peerView{informer.GetIndexer(), informer.HasSynced}
	go informer.RunWithContext(ctx)
	go func() { // a list without objects is no event
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			o.Changed()
		}
	}()
	return nil
}

// shrinkPeer keeps of the status what the node wrote itself, and who else wrote.
func shrinkPeer(a any, node string) any {
	p, ok := a.(*v1alpha1.BGPPeer)
	if !ok {
		return a
	}
	small := &v1alpha1.BGPPeer{ObjectMeta: shrinkMeta(&p.ObjectMeta), Spec: p.Spec}
	small.Generation = p.Generation
	for _, s := range p.Status.Sessions {
		if s.Node != node {
			s = v1alpha1.BGPSession{Node: s.Node}
		}
		small.Status.Sessions = append(small.Status.Sessions, s)
	}
	return small
}

// BGPSessionOf returns a node's entry in the status of a BGPPeer, or nil.
func BGPSessionOf(p *v1alpha1.BGPPeer, node string) *v1alpha1.BGPSession {
	for i := range p.Status.Sessions {
		if p.Status.Sessions[i].Node == node {
			return &p.Status.Sessions[i]
		}
	}
	return nil
}

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
	err = c.fathom.Patch(types.ApplyYAMLPatchType).Resource(bgpPeers).Name(peer).SubResource("status").
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

// BGPPeers reads those that there are. Without the kind, there are none.
func (c *Client) BGPPeers(ctx context.Context) ([]*v1alpha1.BGPPeer, error) {
	var list v1alpha1.BGPPeerList
	if err := c.fathom.Get().Resource(bgpPeers).Do(ctx).Into(&list); err != nil && !isAbsent(err) {
		return nil, fmt.Errorf("list BGPPeers: %w", err)
	}
	return Pointers(list.Items), nil
}

// DeleteBGPPeers deletes all peers. Without the kind, there are none.
func (c *Client) DeleteBGPPeers(ctx context.Context) error {
	err := c.CoreV1().RESTClient().Delete().AbsPath("/apis", v1alpha1.GroupVersion.String(), "bgppeers").Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete the BGP peers: %w", err)
	}
	return nil
}

// BGPPeerReference names a BGPPeer in events.
func BGPPeerReference(p *v1alpha1.BGPPeer) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "BGPPeer", APIVersion: v1alpha1.GroupVersion.String(), Name: p.Name, UID: p.UID}
}

// Secret returns a Secret's data.
func (c *Client) Secret(ctx context.Context, namespace, name string) (map[string][]byte, error) {
	s, err := c.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return s.Data, nil
}
