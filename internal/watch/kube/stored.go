package kube

import (
	"bytes"
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
)

// storedProtobuf begins the value of an object that the API server stores as protobuf.
var storedProtobuf = []byte("k8s\x00")

// IsStoredProtobuf says whether an object of Kubernetes' own kinds is stored as protobuf. Others are JSON.
func IsStoredProtobuf(value []byte) bool { return bytes.HasPrefix(value, storedProtobuf) }

// DecodeStored reads an object of Kubernetes' own kinds in the form that the API server stores it in, in the version that it
// is stored in.
func DecodeStored(value []byte) (runtime.Object, error) {
	object, _, err := scheme.Codecs.UniversalDeserializer().Decode(value, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("read an object as the API server stores it: %w", err)
	}
	return object, nil
}

// EncodeStored is what DecodeStored reads.
func EncodeStored(object runtime.Object) ([]byte, error) {
	kinds, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		return nil, fmt.Errorf("write an object as the API server stores it: %w", err)
	}
	object.GetObjectKind().SetGroupVersionKind(kinds[0])
	var out bytes.Buffer
	if err := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(object, &out); err != nil {
		return nil, fmt.Errorf("write a %s as the API server stores it: %w", kinds[0].Kind, err)
	}
	return out.Bytes(), nil
}
