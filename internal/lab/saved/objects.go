package saved

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/fathom-network/fathom/internal/lab/stored"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// encrypted begins a value that the API server has encrypted.
// https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/
var encrypted = []byte("k8s:enc:")

// compactRevision is where API servers agree on what etcd may forget. It is a revision of the etcd that the lab had.
const compactRevision = "compact_rev_key"

const secretsPath = stored.Registry + "secrets/"

// Keep returns what a file has of a cluster's objects: all as they are or, without secrets, Secrets whose values were made anew. Then it is
// an error if another object has a key or a token in it, as far as one can tell.
func Keep(state stored.State, secrets bool) (stored.State, error) {
	var sealed, keys []string
	var out stored.State
	for _, kv := range state.KVs {
		path := string(kv.Key)
		switch {
		case path == compactRevision:
		case bytes.HasPrefix(kv.Value, encrypted):
			sealed = append(sealed, path)
		case secrets:
			out.KVs = append(out.KVs, kv)
		case strings.HasPrefix(path, secretsPath):
			value, err := remake(kv.Value)
			if err != nil {
				return stored.State{}, fmt.Errorf("make the Secret %s anew: %w", path, err)
			}
			if value != nil {
				out.KVs = append(out.KVs, stored.KV{Key: kv.Key, Value: value})
			}
		case stored.HoldsKey(kv.Value):
			keys = append(keys, path)
		default:
			out.KVs = append(out.KVs, kv)
		}
	}
	if len(sealed) > 0 {
		return stored.State{}, &NotSavedError{sealed, "the API server encrypts them, and nothing can be told of what is in them"}
	}
	if len(keys) > 0 {
		return stored.State{}, &NotSavedError{keys, "it has a key or a token in it: save it --with-secrets, or take it out"}
	}
	return out, nil
}

// remake returns a Secret with other values, or nil for one that is of no use with them.
func remake(value []byte) ([]byte, error) {
	object, err := kube.DecodeStored(value)
	if err != nil {
		return nil, err
	}
	secret, ok := object.(*corev1.Secret)
	if !ok {
		return nil, fmt.Errorf("it is a %T", object)
	}
	switch secret.Type {
	case corev1.SecretTypeBootstrapToken, "helm.sh/release.v1":
		return nil, nil
	}
	delete(secret.Annotations, corev1.LastAppliedConfigAnnotation) // it has the values once more
	if pair := pairLike(secret.Data[corev1.TLSCertKey]); secret.Type == corev1.SecretTypeTLS && pair != nil {
		secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey] = pair.Certificate, pair.Key
	} else {
		for name, data := range secret.Data {
			secret.Data[name] = placeholder(secret.Type, name, data)
		}
	}
	if secret.Type == corev1.SecretTypeServiceAccountToken {
		secret.Data = nil // the controller manager fills it
	}
	return kube.EncodeStored(secret)
}

// pairLike returns a certificate and a key like the one given, or nil if that is none.
func pairLike(cert []byte) *stored.Pair {
	pair, err := stored.PairLike(cert)
	if err != nil {
		return nil
	}
	return pair
}

// placeholder is what a Secret has in the place of a value: as long, and of the form that its type wants.
func placeholder(kind corev1.SecretType, name string, data []byte) []byte {
	switch {
	case kind == corev1.SecretTypeDockerConfigJson && name == corev1.DockerConfigJsonKey:
		return []byte(`{"auths":{}}`)
	case kind == corev1.SecretTypeDockercfg && name == corev1.DockerConfigKey:
		return []byte(`{}`)
	}
	var text string
	for len(text) < len(data) {
		text += strings.ToLower(rand.Text())
	}
	return []byte(text[:len(data)])
}

// begins says whether an object that is not there when a lab begins is made by a program of the cluster, or tells of programs that have ended.
func begins(path string) bool {
	for _, prefix := range []string{"masterleases/", "peerserverleases/", "csinodes/",
		"leases/kube-system/", "leases/kube-node-lease/", "leases/fathom-system/",
		"services/endpoints/default/kubernetes", "endpointslices/default/kubernetes"} {
		if strings.HasPrefix(path, prefix) {
			return false
		}
	}
	return true
}

// Begin returns what a cluster begins with that goes on as the one that was saved. Objects that have nothing of what changes are the same, byte for
// byte. sameKeys says that the cluster has the keys of before, with which its tokens were signed.
func (c *Cluster) Begin(from, to stored.Identity, sameKeys bool) (stored.State, error) {
	move := from.Move(to)
	r := stored.Rewriter{Text: move}
	moves := !sameKeys || !slices.Equal(from.Underlays(), to.Underlays())
	var out stored.State
	for _, kv := range c.State.KVs {
		path, ok := strings.CutPrefix(string(kv.Key), stored.Registry)
		if !ok {
			return stored.State{}, fmt.Errorf("the key %q is none of the API server's", kv.Key)
		}
		if !begins(path) {
			continue
		}
		value, err := begin(path, kv.Value, r, moves, sameKeys)
		if err != nil {
			return stored.State{}, fmt.Errorf("%s: %w", kv.Key, err)
		}
		if value != nil {
			out.KVs = append(out.KVs, stored.KV{Key: kv.Key, Value: value})
		}
	}
	return out, nil
}

// begin returns the value that an object begins with; nil if it is not there when a cluster begins.
func begin(path string, value []byte, r stored.Rewriter, moves, sameKeys bool) ([]byte, error) {
	if !kube.IsStoredProtobuf(value) {
		if !moves || !json.Valid(value) { // revisions and ranges of the API server's own
			return value, nil
		}
		next, err := r.JSON(value)
		if err != nil {
			return nil, err
		}
		if same, err := sameJSON(value, next); err != nil || same {
			return value, err
		}
		return next, nil
	}
	begun := strings.HasPrefix(path, "pods/") || strings.HasPrefix(path, "minions/")
	if !begun && !moves {
		return value, nil
	}
	object, err := kube.DecodeStored(value)
	if err != nil {
		if runtime.IsNotRegisteredError(errors.Unwrap(err)) {
			return value, nil // of an API that is not Kubernetes' own
		}
		return nil, err
	}
	before := object.DeepCopyObject()
	r.Value(reflect.ValueOf(object).Elem())
	switch o := object.(type) {
	case *corev1.Node:
		beginNode(o)
	case *corev1.Pod:
		if _, mirror := o.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
			return nil, nil
		}
		beginPod(o)
	case *corev1.Secret:
		switch {
		case sameKeys:
		case o.Type == corev1.SecretTypeBootstrapToken:
			return nil, nil
		case o.Type == corev1.SecretTypeServiceAccountToken:
			o.Data = nil // signed with a key that is no more; the controller manager fills it
		}
	}
	if reflect.DeepEqual(before, object) {
		return value, nil
	}
	if m, err := meta.Accessor(object); err == nil && m.GetResourceVersion() != "" {
		m.SetResourceVersion("") // as it is stored
	}
	return kube.EncodeStored(object)
}

// beginPod makes of a pod what it was before its node heard of it: its node has none of its containers. One that has ended stays so.
func beginPod(p *corev1.Pod) {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return
	}
	p.Status.Phase = corev1.PodPending
	p.Status.Message, p.Status.Reason = "", ""
	p.Status.HostIP, p.Status.HostIPs, p.Status.PodIP, p.Status.PodIPs, p.Status.StartTime = "", nil, "", nil, nil
	p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses = nil, nil, nil
	p.Status.Conditions = slices.DeleteFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type != corev1.PodScheduled })
	p.ManagedFields = slices.DeleteFunc(p.ManagedFields, func(f metav1.ManagedFieldsEntry) bool { return f.Manager == "kubelet" && f.Subresource == "status" })
}

// beginNode has a node say what the controller manager would say of it: that its kubelet has not been heard of. With conditions as they were, a kubelet
// would take ten seconds to say so again.
func beginNode(n *corev1.Node) {
	for i := range n.Status.Conditions {
		c := &n.Status.Conditions[i]
		c.Status, c.Reason, c.Message = corev1.ConditionUnknown, "NodeStatusUnknown", "Kubelet stopped posting node status."
	}
}

// sameJSON says whether two texts have the same values in them.
func sameJSON(a, b []byte) (bool, error) {
	var x, y any
	if err := errors.Join(json.Unmarshal(a, &x), json.Unmarshal(b, &y)); err != nil {
		return false, err
	}
	return reflect.DeepEqual(x, y), nil
}
